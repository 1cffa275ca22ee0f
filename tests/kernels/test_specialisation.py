"""A new layer shape, rank or scaling must not mean a new compilation where specialising buys nothing."""

import inspect
from importlib import import_module

import pytest

pytest.importorskip("triton")

from lorafast.kernels.common.configs import OPERATIONS

COMPILED_IN = {
    "BLOCK_M",
    "BLOCK_N",
    "BLOCK_K",
    "BLOCK_R",
    "GROUP_M",
    "HAS_BIAS",
    "HAS_DROPOUT",
    "PRECISION",
    "INTERPRETED",
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_sizes_rank_and_numbers_are_run_time_arguments(operation):
    module = import_module(f"lorafast.kernels.{operation}.kernel")
    kernel = getattr(module, f"{operation}_kernel").fn
    parameters = inspect.signature(kernel).parameters
    constants = {
        name
        for name, p in parameters.items()
        if "constexpr" in getattr(p.annotation, "__name__", "")
    }
    assert constants <= COMPILED_IN
    assert {"M", "r"} <= parameters.keys() - constants
    assert {"BLOCK_M", "BLOCK_R"} <= constants
