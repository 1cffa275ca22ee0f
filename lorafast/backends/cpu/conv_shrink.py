"""The native LoRA convolutions, ``csrc/cpu/{lora_conv,conv_shrink*}.cpp``.

They take float32, channels last, in two dimensions. A vendor's convolution takes 16 output channels at a
time, and half of them are zeros at rank 8. The kernels take rows of x where they lie, and at ranks up to
8 two channels at a time. The convolutions with W are PyTorch's, called from there.
"""

import functools

import torch
from torch import Tensor

from lorafast.backends.convolution import Kernels
from lorafast.backends.cpu import native
from lorafast.core.convolution import Geometry, is_channels_last

_LANES = 16
_MOST_RANKS = 8
"""Measured at ranks 4 to 64 with the sizes of ResNet-18 on two cores of a Zen 4: up to rank 8 ``s`` and
``dA`` take 0.55 of the time of oneDNN's. From 16 on, without a lane to spare, both take about as
long."""
_HALF = 4
"""Up to so many ranks oneDNN's convolution fills a quarter of its channels, and fewer of ``x`` pay."""

_MERGED = 8
"""Positions for each channel of y from which merging pays, measured there too: W is small then, and a
weight that has just been written is slow to read."""


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
    return not x.is_contiguous() and is_channels_last(x)


def _shrinks_backward(x: Tensor, lora_A: Tensor) -> bool:
    return x.shape[1] % _LANES == 0 and _fit(x, lora_A)


def _together(dy: Tensor, x: Tensor, s: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    return (
        dy.dtype is s.dtype is lora_B.dtype is torch.float32
        and dy.shape[1] % _LANES == 0
        and lora_B.is_contiguous()
        and _shrinks_backward(x, lora_A)
        and _is_last(dy)
        and is_channels_last(s)
        and _has_a_format(lora_A)
    )


def _serves(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    return (
        weight.dtype is lora_B.dtype is torch.float32
        and lora_B.is_contiguous()
        and _shrinks(x, lora_A)
        and x.shape[1] % _LANES == 0
        and _has_a_format(weight)
        and _has_a_format(lora_A)
    )


def _has_a_format(kernel: Tensor) -> bool:
    return kernel.is_contiguous() or is_channels_last(kernel)


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


def _pays_to_merge(x: Tensor, weight: Tensor) -> bool:
    """Whether W + scaling · B·A costs less than what it saves: A's convolution, or its share of dx."""
    return _has_a_format(weight) and x.numel() >= _MERGED * weight.shape[0] * x.shape[1]


def _lora_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    geometry: Geometry,
    may_merge: bool,
    keep_s: bool,
) -> tuple[Tensor, Tensor | None]:
    merge = may_merge and not keep_s and _pays_to_merge(x, weight)
    found: tuple[Tensor, Tensor | None] = torch.ops.lorafast_cpu.lora_conv(
        x, weight, bias, lora_A, lora_B, scaling, *_numbers(geometry), merge
    )
    return found


def _lora_conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    s: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    geometry: Geometry,
    may_merge: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    merge = may_merge and weight is not None and _pays_to_merge(x, weight)
    found: tuple[Tensor | None, Tensor, Tensor, Tensor] = torch.ops.lorafast_cpu.lora_conv_backward(
        dy, x, weight, s, lora_A, lora_B, scaling, *_numbers(geometry), merge
    )
    return found


def _numbers(geometry: Geometry) -> tuple[int, ...]:
    """As the kernels take them."""
    return *geometry.stride, *geometry.padding, *geometry.dilation


NATIVE = Kernels(
    lora_conv=_lora_conv,
    lora_conv_backward=_lora_conv_backward,
    conv_shrink=_conv_shrink,
    conv_shrink_backward=_conv_shrink_backward,
    serves=_serves,
    together=_together,
    shrinks=_shrinks,
    shrinks_backward=_shrinks_backward,
)
"""Those of this file, wherever the extension is loaded."""
