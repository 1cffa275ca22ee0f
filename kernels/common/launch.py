"""What every launcher needs to know about the machine it launches on."""

import contextlib
import functools
import warnings

import torch
import triton
from lorafast.kernels.common.configs import (
    INTERPRETER_CAPABILITY,
    INTERPRETER_PROCESSORS,
    LaunchConfig,
)
from lorafast.kernels.tables import tuned
from torch import Tensor

from lorafast.kernels import tables
from lorafast.reference.dropout import survivor_scale, threshold

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` at import)."""


def precision(x: Tensor) -> str:
    """How float32 operands are rounded: as PyTorch's own products round them on CUDA; beside float16 to
    its significand, with float32's range."""
    if x.dtype == torch.float16:
        return "tf32"
    allowed = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def dropout_arguments(x: Tensor, dropout_p: float, seed: Tensor | None) -> dict[str, object]:
    """The kernel arguments of a dropout; a kernel without one gets a pointer it never reads."""
    dropped = dropout_p > 0.0 and seed is not None
    return {
        "seed_ptr": seed if dropped else x,
        "threshold": threshold(dropout_p),
        "survivor_scale": survivor_scale(dropout_p),
        "HAS_DROPOUT": dropped,
    }


def processors(x: Tensor) -> int:
    """How many programs of a kernel can run at the same time, one a multiprocessor."""
    return _multiprocessors(x.device) if x.is_cuda else INTERPRETER_PROCESSORS


@functools.lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def capability(x: Tensor) -> int:
    """The compute capability of the device of ``x``, as in ``sm_90``."""
    return _capability(x.device) if x.is_cuda else INTERPRETER_CAPABILITY


@functools.lru_cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def config_for(
    operation: str,
    x: Tensor,
    M: int,
    K: int,
    N: int,
    r: int,
    *,
    adapter_dtype: torch.dtype | None = None,
    masked: bool = False,
    transposed: bool = False,
    bulk: bool = False,
) -> LaunchConfig:
    """The launch configuration for a call of ``operation`` on the device and in the dtype of ``x``.

    ``adapter_dtype``: of the A or B that it reads, if not that of ``x``; ``masked``: whether under
    dropout; ``transposed``: whether the product reads Wᵀ; ``bulk``: whether bulk copies can read and
    write its operands.
    """
    device = device_name(x)
    dtypes = tuned.dtypes(x.dtype, adapter_dtype or x.dtype, precision(x) == "tf32")
    key = tuned.Key(operation, dtypes, M, K, N, r, masked, transposed)
    record = tuned.nearest(device, key)
    if record is not None and record.config is not None and (bulk or not record.config.descriptors):
        return record.config
    if x.is_cuda and not tuned.load(device):
        _say_untuned(device, capability(x))
    return tables.find(operation, capability(x), x.dtype, M, K, N, r, bulk)


def rule_for(operation: str, x: Tensor, M: int, K: int, N: int, r: int) -> LaunchConfig:
    """The configuration of the architecture's table, whatever was tuned: a launch with helpers must
    have room for it beside the GEMM."""
    return tables.find(operation, capability(x), x.dtype, M, K, N, r)


def device_name(x: Tensor) -> str:
    """As PyTorch names the device; ``interpreter`` off CUDA."""
    return _device_name(x.device) if x.is_cuda else tuned.INTERPRETER


@functools.lru_cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@functools.cache
def _say_untuned(device: str, sm: int) -> None:
    if device not in tables.tuned_on(sm):
        warnings.warn(
            f"lorafast's kernels are not tuned for {device}: they use the rules for "
            f"sm_{sm}. `lorafast tune` measures what is fastest on it, once, in minutes.",
            stacklevel=2,
        )


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches go to the current device: makes that the device of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
