"""The fastest composition of PyTorch's own calls.

The expansion comes first, and the base GEMM is accumulated onto it. ``y = scaling · s·Bᵀ`` is skinny
and only writes y. The base GEMM of cuBLAS, oneDNN or MKL then reads y back as its accumulator, hidden
behind its arithmetic. Only the small term is rounded early.

In float16 the small term may not be: it lives in float32 and is added to the finished base product,
before the one rounding of the sum. Where the base product is a packed copy's or a format's, which
accumulate onto nothing, the expansion comes after it too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafast import operands
from lorafast.backends.dropout import dropout
from lorafast.backends.plan import Run
from lorafast.core.problem import WANTS
from lorafast.operands import Weight

_HALF = torch.float16


def small_lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """The layer without dropout in the fewest and cheapest calls, for PyTorch to differentiate."""
    y = operands.linear(x, weight, bias)
    if x.dtype is _HALF:
        s = F.linear(x.float(), lora_A.float())
        return torch.add(y, F.linear(s, lora_B.float()), alpha=scaling).to(x.dtype)
    s = F.linear(x, lora_A)
    if scaling == 1.0:
        return y.addmm_(s, lora_B.t())
    return y.addmm_(s, lora_B.t(), alpha=scaling)


def merged_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """The layer without dropout as ``x·(W + scaling · B·A)ᵀ + bias``: two calls instead of three.

    Not below float32, where the sum would round small updates away. A frozen A has no gradient to keep x
    for, which this does. Where x is infinite an element may be an infinity that is NaN in the reference,
    which adds infinities of both signs; none is finite in one of them alone.
    """
    if not lora_A.requires_grad and torch.is_grad_enabled():
        return small_lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed)
    if scaling == 1.0:
        return F.linear(x, torch.addmm(weight, lora_B, lora_A), bias)
    return F.linear(x, torch.addmm(weight, lora_B, lora_A, alpha=scaling), bias)


def shrink(x: Tensor, lora_A: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """``s = drop(x)·Aᵀ``."""
    if x.dtype is _HALF:
        x = x.float()
    if dropout_p:
        x = dropout(x, dropout_p, seed)
    if lora_A.dtype is not x.dtype:
        lora_A = lora_A.to(x.dtype)
    return torch.mm(x, lora_A.t())


def expand(dtype: torch.dtype) -> Run:
    """``y = drop(scaling · s·Bᵀ)`` in ``dtype``."""

    def run(
        s: Tensor, lora_B: Tensor, scaling: float, dropout_p: float, seed: Tensor | None
    ) -> Tensor:
        return _expand(s, lora_B, scaling, dropout_p, seed).to(dtype)

    return run


def _expand(
    s: Tensor, lora_B: Tensor, scaling: float, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """``drop(scaling · s·Bᵀ)`` in the dtype of ``s``."""
    if lora_B.dtype is not s.dtype:
        lora_B = lora_B.to(s.dtype)
    return dropout(scaled_mm(s, lora_B.t(), scaling), dropout_p, seed)


def linear_expand(
    x: Tensor,
    weight: Weight,
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias``."""
    if x.dtype is _HALF:
        low = _expand(s, lora_B, scaling, dropout_p, seed)
        return low.add_(operands.linear(x, weight, bias)).to(x.dtype)
    if lora_B.dtype is not x.dtype:
        lora_B = lora_B.to(x.dtype)
    base = operands.finished_linear(x, weight, bias)
    if base is not None:
        if dropout_p:
            return base.add_(_expand(s, lora_B, scaling, dropout_p, seed))
        return base.addmm_(s, lora_B.t(), alpha=scaling)
    if bias is None:
        y = _expand(s, lora_B, scaling, dropout_p, seed)
    elif dropout_p:
        y = _expand(s, lora_B, scaling, dropout_p, seed).add_(bias)
    else:
        y = torch.addmm(bias, s, lora_B.t(), alpha=scaling)
    return operands.add_linear_(y, x, weight)


def linear_expand_transposed(
    dy: Tensor,
    weight: Weight,
    ds: Tensor,
    lora_A_t: Tensor,
    scaling: float,
    bias: None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """``dx = dy·W + drop(scaling · ds·A)``."""
    low = _expand(ds, lora_A_t, scaling, dropout_p, seed)
    if dy.dtype is _HALF:
        return low.add_(operands.linear_transposed(dy, weight)).to(dy.dtype)
    return operands.add_linear_transposed_(low, dy, weight)


def expand_backward(wants: tuple[str, ...], dtype: torch.dtype) -> Run:
    """``ds = scaling · dy·B``, ``dB = scaling · dyᵀ·s`` in ``dtype``, ``dbias = Σ dy``."""
    want_ds, want_dB, want_dbias = (name in wants for name in WANTS["expand_backward"])

    def run(
        dy: Tensor, s: Tensor | None, lora_B: Tensor | None, scaling: float
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        ds = dB = None
        wide = dy.float() if dy.dtype is _HALF else dy
        if want_ds:
            assert lora_B is not None
            ds = scaled_mm(wide, lora_B.to(wide.dtype), scaling)
        if want_dB:
            assert s is not None
            dB = scaled_mm(wide.t(), s, scaling).to(dtype)
        return ds, dB, dy.sum(0) if want_dbias else None

    return run


def shrink_backward(dtype: torch.dtype) -> Run:
    """``dA = dsᵀ·drop(x)`` in ``dtype``."""

    def run(ds: Tensor, x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
        if x.dtype is _HALF:
            x = x.float()
        return torch.mm(ds.t(), dropout(x, dropout_p, seed)).to(dtype)

    return run


def scaled_mm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale · a·b`` in one call: beta = 0 leaves the output's old content unread."""
    if scale == 1.0:
        return torch.mm(a, b)
    out = a.new_empty((a.shape[0], b.shape[1]))
    return out.addmm_(a, b, beta=0.0, alpha=scale)
