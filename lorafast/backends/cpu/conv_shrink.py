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
"""Measured at ranks 4 to 64 with the sizes of ResNet-18 on two cores of a Zen 4: up to rank 8 ``s`` and
``dA`` take 0.55 of the time of oneDNN's. From 16 on, without a lane to spare, both take about as
long."""
_HALF = 4
"""Up to so many ranks oneDNN's convolution fills a quarter of its channels, and fewer of ``x`` pay."""


def _least_channels(r: int) -> int:
    """Of ``x``: rows of fewer cost more here, measured from 3 to 32 channels."""
    return 16 if r <= _HALF else 24


@functools.cache
def kernels() -> Kernels | None:
    """None where the extension can't be loaded, or without AVX-512, where oneDNN is faster."""
    if native.why_not_loaded() is not None or not native.has_avx512():
        return None
    return NATIVE


def _shrinks(x: Tensor, lora_A: Tensor) -> bool:
    return x.shape[1] >= _least_channels(lora_A.shape[0]) and _fit(x, lora_A)


def _fit(x: Tensor, lora_A: Tensor) -> bool:
    return (
        x.dtype is torch.float32
        and lora_A.dtype is torch.float32
        and x.dim() == 4
        and lora_A.shape[0] <= _MOST_RANKS
        and _is_last(x)
    )


def _is_last(x: Tensor) -> bool:
    """Channels last, and not contiguous too."""
    return x.stride(1) == 1 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _shrinks_backward(x: Tensor, lora_A: Tensor) -> bool:
    return x.shape[1] % _LANES == 0 and _fit(x, lora_A)


def _together(dy: Tensor, x: Tensor, s: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    return (
        dy.dtype is s.dtype is lora_B.dtype is torch.float32
        and dy.shape[1] % _LANES == 0
        and lora_B.is_contiguous()
        and _shrinks_backward(x, lora_A)
        and _is_last(dy)
        and s.movedim(1, -1).is_contiguous()
    )


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


def _lora_conv_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    geometry: Geometry,
) -> tuple[Tensor, Tensor, Tensor]:
    dA = x.new_empty((lora_A.shape[0], *lora_A.shape[2:], lora_A.shape[1]))
    dB, s = lora_B.new_empty(lora_B.shape), s.movedim(1, -1)
    ds = s.new_empty(s.shape)
    torch.ops.lorafast_cpu.lora_conv_backward(
        dy.movedim(1, -1), x.movedim(1, -1), s, lora_B.flatten(1), scaling, *_numbers(geometry), ds,
        dA, dB.flatten(1),
    )  # fmt: skip
    return ds.movedim(-1, 1), dA.movedim(-1, 1), dB


def _numbers(geometry: Geometry) -> tuple[int, ...]:
    """As the kernels take them."""
    return *geometry.stride, *geometry.padding, *geometry.dilation


NATIVE = Kernels(
    _conv_shrink, _conv_shrink_backward, _lora_conv_backward, _shrinks, _shrinks_backward, _together
)
"""Those of this file, wherever the extension is loaded."""
