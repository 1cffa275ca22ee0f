"""What reads codes, compiled for every architecture: nothing spills, and accesses are wide."""

import itertools
import os

import pytest
import torch
from helpers import covering

pytest.importorskip("triton")

from lorafast.kernels.common.codes_plan import codes_launch
from lorafast.kernels.common.configs import SHARED_MEMORY
from lorafast.kernels.common.launch import INTERPRETED
from lorafast.kernels.dequantize import dequantize
from lorafast.kernels.linear_expand import codes
from machine_code import _compile
from recorded import launches_of

from lorafast.operands import FP8, NF4, Int8

pytestmark = [
    pytest.mark.slow,
    pytest.mark.executed,
    pytest.mark.skipif(INTERPRETED, reason="needs a process without TRITON_INTERPRET"),
]
N = K = 4096


def empty(*size, dtype=torch.uint8):
    return torch.empty(size, dtype=dtype, device="meta")


def weight_of(kind, dtype):
    scale = empty(N, dtype=torch.float32)
    if kind == "int8":
        return Int8({"weight": empty(N, K, dtype=torch.int8), "scale": scale}, dtype)
    if kind == "fp8":
        return FP8({"weight": empty(N, K), "scale": scale}, dtype)
    blocks = N * K // 64
    tensors = {
        "weight": empty(N * K // 2, 1),
        "absmax": empty(blocks),
        "nested_absmax": empty(blocks // 256, dtype=torch.float32),
        "nested_quant_map": empty(256, dtype=torch.float32),
        "nested_offset": empty(dtype=torch.float32),
    }
    return NF4(tensors, (N, K), dtype, 64, 256)


def machine_of(capability, call):
    (launch,) = launches_of(capability, call)
    machine = _compile(launch, capability)
    assert (machine.spills, machine.local, machine.serialized) == (0, 0, False)
    assert machine.shared <= SHARED_MEMORY[capability]
    return machine.instructions


KINDS = ("nf4 nested", "int8", "fp8")
EVERY = os.environ.get("EXECUTE") == "all"
choices = itertools.product if EVERY else covering
"""Each compilation takes two seconds: ``make test-executed`` asks for all of them."""


@pytest.mark.parametrize(
    ("capability", "kind", "dtype"),
    choices(list(SHARED_MEMORY), KINDS, (torch.bfloat16, torch.float32)),
    ids=str,
)
def test_dequantize(capability, kind, dtype):
    weight, W = weight_of(kind, dtype), empty(N, K, dtype=dtype)
    assert "STG.128" in machine_of(capability, lambda: dequantize(weight, W))


@pytest.mark.parametrize(
    ("capability", "kind", "M", "product"),
    choices(list(SHARED_MEMORY), KINDS, (16, 64, 128), ("y", "dx")),
    ids=str,
)
def test_a_product_that_reads_codes(capability, kind, M, product):
    """Its codes are copied to shared memory ahead of their use."""
    transposed = product == "dx"
    launch = codes_launch(
        M, K, N, 16, sms=132, dtype=torch.bfloat16, precision="ieee", transposed=transposed
    )
    x, s, B = (empty(*size, dtype=torch.bfloat16) for size in ((M, K), (M, 16), (N, 16)))
    weight = weight_of(kind, torch.bfloat16)
    has = machine_of(capability, lambda: codes.launcher(launch)(x, weight, s, B, 0.5))
    assert "LDGSTS.128" in has
