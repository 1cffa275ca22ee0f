"""What every launcher needs to know about the machine it launches on."""

import contextlib
import functools

import torch
import triton
from torch import Tensor

from lorafast.reference.dropout import survivor_scale, threshold

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` at import)."""
INTERPRETER_PROCESSORS = 4
"""The interpreter runs programs one by one; a few make it cut and add up as a device does."""


def precision(x: Tensor) -> str:
    """How float32 operands are rounded: as PyTorch's own products round them on CUDA."""
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


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches go to the current device: makes that the device of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
