"""The fastest composition of PyTorch's own calls.

The expansion comes first and the base product is accumulated onto it: ``y = scaling · s·Bᵀ`` is thin
and only written, then the vendor's product reads it back as its accumulator, hidden behind the
arithmetic. Only the small term is rounded early.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafast.reference.dropout import dropout

SMALL = 1 << 22
"""Multiply-adds of the base product below which a call's own cost counts more than its passes."""


def small_lora_linear(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, bias: Tensor | None
) -> Tensor:
    """The LoRA linear layer without dropout for ``x [M, K]``, in the fewest and cheapest calls.

    PyTorch differentiates it itself, which costs a small layer less than a backward in Python.
    """
    y = F.linear(x, weight, bias)
    s = F.linear(x, lora_A)
    if scaling == 1.0:
        return y.addmm_(s, lora_B.t())
    return y.addmm_(s, lora_B.t(), alpha=scaling)


def shrink(x: Tensor, lora_A: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """``s = drop(x)·Aᵀ``."""
    if dropout_p:
        x = dropout(x, dropout_p, seed)
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
    if lora_B.dtype is not x.dtype:
        lora_B = lora_B.to(x.dtype)
    if dropout_p:
        y = dropout(_scaled_mm(s, lora_B.t(), scaling), dropout_p, seed)
        if bias is not None:
            y += bias
    elif bias is None:
        y = _scaled_mm(s, lora_B.t(), scaling)
    else:
        y = torch.addmm(bias, s, lora_B.t(), alpha=scaling)
    return y.addmm_(x, weight.t())


def expand_backward(dy: Tensor, s: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """``ds = scaling · dy·B`` and ``dB = scaling · dyᵀ·s``."""
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
    return torch.mm(ds.t(), dropout(x, dropout_p, seed)).to(dtype or x.dtype)


def _scaled_mm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale · a·b`` in one call: beta = 0 leaves the output's old content unread."""
    if scale == 1.0:
        return torch.mm(a, b)
    out = a.new_empty((a.shape[0], b.shape[1]))
    return out.addmm_(a, b, beta=0.0, alpha=scale)
