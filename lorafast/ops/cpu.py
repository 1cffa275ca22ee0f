"""The native CPU kernels of ``csrc/cpu/`` for the thin products; the base product stays the vendor's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafast.operands import packed
from lorafast.ops import native
from lorafast.reference import wide
from lorafast.reference.dropout import survivor_scale, threshold

_HALF = torch.float16
native.why_not_loaded()  # loads them
_kernels = torch.ops.lorafast_cpu
_shrink = _kernels.shrink.default
_expand_ = _kernels.expand_.default
_expand_backward = _kernels.expand_backward.default
_shrink_backward = _kernels.shrink_backward.default
_lora_linear_ = _kernels.lora_linear_.default
_lora_linear_backward_ = _kernels.lora_linear_backward_.default


def _mask(dropout_p: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    if not dropout_p:
        return None, 0, 1.0
    return seed, threshold(dropout_p), survivor_scale(dropout_p)


def _low_rank(x: Tensor, r: int) -> Tensor:
    """Memory for ``s``; naming a dtype costs a small layer a hundredth of its forward."""
    if x.dtype is _HALF:
        return x.new_empty((x.shape[0], r), dtype=wide(_HALF))
    return x.new_empty((x.shape[0], r))


def shrink(x: Tensor, lora_A: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """``s = drop(x)·Aᵀ``."""
    s = _low_rank(x, lora_A.shape[0])
    _shrink(x, lora_A, *_mask(dropout_p, seed), s)
    return s


def linear_expand(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias``."""
    y = packed.linear(x, weight, bias)
    _expand_(y, s, lora_B, float(scaling), *_mask(dropout_p, seed))
    return y


def expand_backward(dy: Tensor, s: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """``ds = scaling · dy·B`` and ``dB = scaling · dyᵀ·s``."""
    ds, dB = s.new_empty(s.shape), lora_B.new_empty(lora_B.shape)
    _expand_backward(dy, s, lora_B, float(scaling), ds, dB)
    return ds, dB


def shrink_backward(
    ds: Tensor,
    x: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``dA = dsᵀ·drop(x)``."""
    dA = x.new_empty((ds.shape[1], x.shape[1]), dtype=dtype or x.dtype)
    _shrink_backward(ds, x, *_mask(dropout_p, seed), dA)
    return dA


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``shrink`` and ``linear_expand``: ``y`` and ``s``, the thin products in one call."""
    y = packed.linear(x, weight, bias)
    s = _low_rank(x, lora_A.shape[0])
    _lora_linear_(y, x, lora_A, lora_B, float(scaling), *_mask(dropout_p, seed), s)
    return y, s


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``expand_backward``, ``shrink_backward`` and ``linear_expand``: ``dx``, ``dA``, ``dB``."""
    dx = F.linear(dy, weight.t())
    ds, dA, dB = (
        s.new_empty(s.shape),
        lora_A.new_empty(lora_A.shape),
        lora_B.new_empty(lora_B.shape),
    )
    mask = _mask(dropout_p, seed)
    _lora_linear_backward_(dx, dy, x, lora_A, lora_B, s, float(scaling), *mask, ds, dA, dB)
    return dx, dA, dB
