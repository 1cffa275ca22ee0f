"""What launchers share: the device, the arguments of a dropout, the configuration of a call."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton
from lorafast.kernels.common.configs import (
    INTERPRETER_CAPABILITY,
    INTERPRETER_SMS,
    LaunchConfig,
)
from lorafast.kernels.common.plan import precision_of, skinny_precision_of
from torch import Tensor

from lorafast.core.sms import planned_for
from lorafast.kernels import tables
from lorafast.reference.dropout import survivor_scale, threshold

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter: ``TRITON_INTERPRET=1`` was set at its import."""
KEPT = 4096
"""Launchers that are cached for each operation."""
Run = TypeVar("Run", bound=Callable[..., Any])


def precision(x: Tensor) -> str:
    """The precision in which float32 operands are multiplied with ``x``, as ``tl.dot`` names it."""
    return precision_of(x.dtype, tf32())


def skinny_precision(x: Tensor) -> str:
    """The same in ``shrink`` and ``shrink_backward``."""
    return skinny_precision_of(x.dtype, tf32())


def tf32() -> bool:
    """Whether PyTorch may round the factors of float32 products to TF32."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


@functools.lru_cache(maxsize=256)
def _numbers(dropout_p: float) -> tuple[int, float]:
    return threshold(dropout_p), survivor_scale(dropout_p)


def mask_of(dropout_p: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """The arguments of a dropout that kernels take: seed, threshold, and the factor of what is kept."""
    return seed, *_numbers(dropout_p)


NO_MASK = mask_of(0.0, None)


def sms(x: Tensor) -> int:
    """The number of SMs that launches are planned for on the device of ``x``."""
    return planned_for(_sms(x.device) if x.is_cuda else INTERPRETER_SMS)


@functools.lru_cache
def _sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def capability(x: Tensor) -> int:
    """The compute capability of the device of ``x``, as in ``sm_90``."""
    return _capability(x.device) if x.is_cuda else INTERPRETER_CAPABILITY


@functools.lru_cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def rule_for(
    operation: str, x: Tensor, M: int, K: int, N: int, r: int, tma: bool = False
) -> LaunchConfig:
    """The configuration in the table of the device's architecture for a call with these sizes, in the
    dtype of ``x``. ``tma``: whether TMA can read and write its operands."""
    return tables.find(operation, capability(x), x.dtype, M, K, N, r, tma)


def on_its_device(run: Run) -> Run:
    """Makes the device of the first argument the current one, to which Triton launches."""

    @functools.wraps(run)
    def on_device(x: Tensor, *others: Any) -> Any:
        index = x.get_device()
        if index < 0 or index == torch.cuda.current_device():
            return run(x, *others)
        with torch.cuda.device(index):
            return run(x, *others)

    return on_device  # type: ignore[return-value]
