"""The native convolutions with A, ``csrc/cpu/conv_shrink*.cpp``: float32, channels last, two dimensions.

A vendor's convolution takes 16 output channels at a time, and half of them are zeros at rank 8. The
kernels take rows of x where they lie, and at ranks up to 8 two channels at a time.
"""

import functools

import torch
from torch import Tensor

from lorafast.backends.convolution import Kernels
from lorafast.backends.cpu import native
from lorafast.core.convolution import Geometry

_LANES = 16
_MOST_RANKS = 8
"""Measured at ranks 4 to 64, with the sizes of ResNet-18: above, oneDNN's convolution is as fast."""


@functools.cache
def kernels() -> Kernels | None:
    """None where the extension can't be loaded."""
    if native.why_not_loaded() is not None:
        return None
    return Kernels(_conv_shrink, _conv_shrink_backward, _shrinks, _shrinks_backward)


def _shrinks(x: Tensor, lora_A: Tensor) -> bool:
    return (
        x.dtype is torch.float32
        and lora_A.dtype is torch.float32
        and x.dim() == 4
        and lora_A.shape[0] <= _MOST_RANKS
        and x.stride(1) == 1
        and not x.is_contiguous()
        and x.movedim(1, -1).is_contiguous()
    )


def _shrinks_backward(x: Tensor, lora_A: Tensor) -> bool:
    return x.shape[1] % _LANES == 0 and _shrinks(x, lora_A)


def _conv_shrink(x: Tensor, lora_A: Tensor, geometry: Geometry) -> Tensor:
    sizes = [
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, padding, dilation in zip(
            x.shape[2:], lora_A.shape[2:], *geometry[:3], strict=True
        )
    ]
    s = x.new_empty((x.shape[0], *sizes, lora_A.shape[0]))
    A = lora_A.movedim(1, -1).contiguous()
    torch.ops.lorafast_cpu.conv_shrink(x.movedim(1, -1), A, *_numbers(geometry), s)
    return s.movedim(-1, 1)


def _conv_shrink_backward(ds: Tensor, x: Tensor, lora_A: Tensor, geometry: Geometry) -> Tensor:
    dA = x.new_empty((lora_A.shape[0], *lora_A.shape[2:], lora_A.shape[1]))
    ds, x = ds.movedim(1, -1).contiguous(), x.movedim(1, -1)
    torch.ops.lorafast_cpu.conv_shrink_backward(ds, x, *_numbers(geometry), dA)
    return dA.movedim(-1, 1)


def _numbers(geometry: Geometry) -> tuple[int, ...]:
    """As the kernels take them."""
    return *geometry.stride, *geometry.padding, *geometry.dilation
