"""The fastest composition of PyTorch's own calls.

The expansion comes first and the base product is accumulated onto it: ``y = scaling · s·Bᵀ`` is thin
and only written, then the vendor's product reads it back as its accumulator, hidden behind the
arithmetic. Only the small term is rounded early.

In float16 the small term may not be: it lives in float32 and is added to the finished base product,
before the one rounding of the sum.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafast.operands import packed
from lorafast.reference.dropout import (
    COLUMNS_PER_CALL,
    MULTIPLIERS,
    ROUNDS,
    WEYL,
    survivor_scale,
    threshold,
)

_LOW = 0xFFFFFFFF
_HALF = torch.float16
SMALL = 1 << 22
"""Multiply-adds of the base product below which a call's own cost counts more than its passes."""


def small_lora_linear(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, bias: Tensor | None
) -> Tensor:
    """The LoRA linear layer without dropout for ``x [M, K]``, in the fewest and cheapest calls.

    PyTorch differentiates it itself, which costs a small layer less than a backward in Python.
    """
    y = packed.linear(x, weight, bias)
    if x.dtype is _HALF:
        s = F.linear(x.float(), lora_A.float())
        return torch.add(y, F.linear(s, lora_B.float()), alpha=scaling).to(x.dtype)
    s = F.linear(x, lora_A)
    if scaling == 1.0:
        return y.addmm_(s, lora_B.t())
    return y.addmm_(s, lora_B.t(), alpha=scaling)


def shrink(x: Tensor, lora_A: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """``s = drop(x)·Aᵀ``."""
    if x.dtype is torch.float16:
        x = x.float()
    if dropout_p:
        x = _dropout(x, dropout_p, seed)
    if lora_A.dtype is not x.dtype:
        lora_A = lora_A.to(x.dtype)
    return torch.mm(x, lora_A.t())


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
    if x.dtype is torch.float16:
        low = _dropout(_scaled_mm(s, lora_B.float().t(), scaling), dropout_p, seed)
        return low.add_(packed.linear(x, weight, bias)).to(x.dtype)
    if lora_B.dtype is not x.dtype:
        lora_B = lora_B.to(x.dtype)
    base = packed.linear_if_packed(x, weight, bias)
    if base is not None:
        if dropout_p:
            return base.add_(_dropout(_scaled_mm(s, lora_B.t(), scaling), dropout_p, seed))
        return base.addmm_(s, lora_B.t(), alpha=scaling)
    if dropout_p:
        y = _dropout(_scaled_mm(s, lora_B.t(), scaling), dropout_p, seed)
        if bias is not None:
            y += bias
    elif bias is None:
        y = _scaled_mm(s, lora_B.t(), scaling)
    else:
        y = torch.addmm(bias, s, lora_B.t(), alpha=scaling)
    return y.addmm_(x, weight.t())


def expand_backward(dy: Tensor, s: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """``ds = scaling · dy·B`` and ``dB = scaling · dyᵀ·s``."""
    if dy.dtype is torch.float16:
        dy = dy.float()
    ds = _scaled_mm(dy, lora_B.to(dy.dtype), scaling)
    dB = _scaled_mm(dy.t(), s, scaling)
    return ds, dB.to(lora_B.dtype)


def shrink_backward(
    ds: Tensor,
    x: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``dA = dsᵀ·drop(x)``."""
    dtype = dtype or x.dtype
    if x.dtype is torch.float16:
        x = x.float()
    return torch.mm(ds.t(), _dropout(x, dropout_p, seed)).to(dtype)


def _scaled_mm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale · a·b`` in one call: beta = 0 leaves the output's old content unread."""
    if scale == 1.0:
        return torch.mm(a, b)
    out = a.new_empty((a.shape[0], b.shape[1]))
    return out.addmm_(a, b, beta=0.0, alpha=scale)


def _dropout(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """``lorafast.reference.dropout``, its mask made in the memory of a few temporaries."""
    if not dropout_p or seed is None:
        return x
    M, K = x.shape
    keep = keep_mask(M, K, dropout_p, seed)
    return torch.where(keep, x, 0.0).mul_(survivor_scale(dropout_p))


def keep_mask(M: int, K: int, dropout_p: float, seed: Tensor) -> Tensor:
    """The boolean mask ``[M, K]`` of ``lorafast.reference.keep_mask``, two to three times as fast."""
    groups = -(-K // COLUMNS_PER_CALL)
    index = torch.arange(M * groups, device=seed.device)
    keep = torch.empty((M * groups, COLUMNS_PER_CALL), dtype=torch.bool, device=seed.device)
    dropped_below = threshold(dropout_p)
    for i, word in enumerate(_philox(index, seed.reshape(()))):
        torch.ge(word & 0xFFFF, dropped_below, out=keep[:, 2 * i])
        torch.ge(word >> 16, dropped_below, out=keep[:, 2 * i + 1])
    return keep.view(M, groups * COLUMNS_PER_CALL)[:, :K]


def _philox(index: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    """The four words for counter ``index`` and key ``seed``; see ``reference.philox_4x32``."""
    c0, c1 = index & _LOW, index >> 32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    product0, product1 = torch.empty_like(c0), torch.empty_like(c0)
    for _ in range(ROUNDS):
        torch.mul(c0, MULTIPLIERS[0], out=product0)
        torch.mul(c2, MULTIPLIERS[1], out=product1)
        torch.bitwise_right_shift(product1, 32, out=c0)
        c0.bitwise_and_(_LOW).bitwise_xor_(c1).bitwise_xor_(k0)
        torch.bitwise_right_shift(product0, 32, out=c2)
        c2.bitwise_and_(_LOW).bitwise_xor_(c3).bitwise_xor_(k1)
        torch.bitwise_and(product1, _LOW, out=c1)
        torch.bitwise_and(product0, _LOW, out=c3)
        k0, k1 = (k0 + WEYL[0]) & _LOW, (k1 + WEYL[1]) & _LOW
    return c0, c1, c2, c3
