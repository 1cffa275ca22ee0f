"""The LoRA convolution in one, two or three dimensions, and its backward."""

from typing import Any

import torch
from torch import Tensor

from lorafast.core.convolution import Geometry, convolve
from lorafast.core.dtypes import wide
from lorafast.reference.dropout import dropout


def lora_conv(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    geometry: Geometry,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``y = conv(x, W) + scaling · conv(conv(drop(x), A), B) + bias`` (Hu et al., "LoRA", 2021; PEFT).

    Shapes: ``x [batch, C, *size]``, ``weight [N, C / groups, *kernel]``, ``lora_A [r, C, *kernel]``,
    ``lora_B [N, r / groups, 1, …]``, ``bias [N]`` → ``y [batch, N, *size of y]`` in the dtype of ``x``.
    A has the windows of W and sees all channels; B is a product at each position, in ``groups``.
    The mask is that of x as a matrix of positions and channels. Differentiable by PyTorch's own
    autograd, any number of times.
    """
    s = conv_shrink(x, lora_A, geometry, dropout_p, seed)
    low_rank = scaling * convolve(s, lora_B.to(s.dtype), None, _pointwise(geometry))
    return (convolve(x, weight, bias, geometry) + low_rank).to(x.dtype)


def lora_conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    scaling: float,
    *,
    geometry: Geometry,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``dx``, ``dW``, ``dA``, ``dB`` and ``dbias``, from what a forward keeps.

        ds = scaling · conv(dy, Bᵀ)                      [batch, r, *size of y]
        dB = scaling · Σ dy ⊗ s                          over batch and positions
        dA = the weight's gradient of conv(drop(x), A), given ds
        dx = conv_transpose(dy, W) + drop(conv_transpose(ds, A))

    Shapes and dtypes: those of the forward's arguments; ``s [batch, r, *size of y]``.
    """
    ds, dB = _gradients(scaling * dy.to(s.dtype), s, lora_B.to(s.dtype), _pointwise(geometry))
    left = drop(x.to(s.dtype), dropout_p, seed)
    dleft, dA = _gradients(ds, left, lora_A.to(s.dtype), geometry.of_A())
    dx, dweight = _gradients(dy, x, weight, geometry)
    dx = (dx + drop(dleft, dropout_p, seed)).to(x.dtype)
    dbias = dy.sum((0, *range(2, dy.dim())))
    return dx, dweight, dA.to(lora_A.dtype), dB.to(lora_B.dtype), dbias


def conv_shrink(
    x: Tensor,
    lora_A: Tensor,
    geometry: Geometry,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``s = conv(drop(x), A)``, ``[batch, r, *size of y]``, in ``wide(x.dtype)``."""
    low = wide(x.dtype)
    return convolve(drop(x.to(low), dropout_p, seed), lora_A.to(low), None, geometry.of_A())


def drop(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """``drop(x)`` of ``x [batch, C, *size]``, with the mask of the matrix [batch · positions, C]."""
    if not dropout_p:
        return x
    channels_last = x.movedim(1, -1)
    rows = dropout(channels_last.reshape(-1, x.shape[1]), dropout_p, seed)
    return rows.view(channels_last.shape).movedim(-1, 1)


def _pointwise(geometry: Geometry) -> Geometry:
    """The convolution with B: a product at each position."""
    n = len(geometry.stride)
    return Geometry((1,) * n, (0,) * n, (1,) * n, geometry.groups)


def _gradients(dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Of ``conv(x, W)`` in ``x`` and in W."""
    stride, padding, dilation, groups = geometry
    none = [0] * len(stride)
    backward: Any = torch.ops.aten.convolution_backward
    dx, dweight, _ = backward(
        dy, x, weight, None, stride, padding, dilation, False, none, groups, [True, True, False]
    )  # fmt: skip
    return dx, dweight
