"""LoKr: a product with ``w1 ⊗ w2`` is two small ones over x as ``[b, M, d]``, and it is never made.

``z = x·w2ᵀ [b, M, c]``, then ``w1·z [a, M, c]``, which is added to the frozen layer's y where that lies.

x is kept for the backward, which makes z again. All is computed in the wider dtype of x and the adapter,
float16 in float32: neither z nor its gradient need fit into it.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lorafast.core.context import alone, without_autocast
from lorafast.core.dtypes import wide
from lorafast.core.problem import is_plain
from lorafast.operands import Weight
from lorafast.ops.dora_linear import frozen_linear

Factors = Tensor | tuple[Tensor, Tensor]


def lokr_linear(
    x: Tensor,
    weight: Weight,
    w1: Tensor,
    w2: Factors,
    scaling: float,
    bias: Tensor | None = None,
) -> Tensor:
    """``y = x·Wᵀ + scaling · x·(w1 ⊗ w2)ᵀ + bias``, on checked arguments outside autocast."""
    return add_kronecker(frozen_linear(x, weight, bias), x, w1, w2, scaling).to(x.dtype)


def add_kronecker(y: Tensor, x: Tensor, w1: Tensor, w2: Factors, scaling: float) -> Tensor:
    """``y + scaling · x·(w1 ⊗ w2)ᵀ``, rounded once, to the dtype of y, and written to y where it can be:
    nobody else may have it."""
    if _by_autograd(x, w1, w2) or not is_plain(y) or not y.is_contiguous():
        return (y + kronecker(x, w1, w2, scaling)).to(y.dtype)
    first, second = _two(w2)
    if torch.is_grad_enabled():
        found: Tensor = _apply(y, x, w1, first, second, scaling)
        return found
    return _add(y, x, w1, first, second, scaling)


def kronecker(x: Tensor, w1: Tensor, w2: Factors, scaling: float) -> Tensor:
    """``scaling · x·(w1 ⊗ w2)ᵀ [..., a·c]`` of ``x [..., b·d]``, ``w1 [a, b]``, ``w2 [c, d]``.

    In the wider dtype of x and the adapter, float32 for float16, which the caller rounds.
    ``w2`` is a matrix, or ``[c, r]`` and ``[r, d]``, of which it is the product.
    """
    first, second = _two(w2)
    if _by_autograd(x, w1, w2) or not torch.is_grad_enabled():
        return _forward(x, w1, first, second, scaling)
    dtype = wide(torch.promote_types(x.dtype, w1.dtype))
    y = x.new_zeros((*x.shape[:-1], w1.shape[0] * first.shape[0]), dtype=dtype)
    found: Tensor = _apply(y, x, w1, first, second, scaling)
    return found


def _two(w2: Factors) -> tuple[Tensor, Tensor | None]:
    """``w2``, or its two factors ``[c, r]`` and ``[r, d]`` where these take less than half the products:
    what is between them would be one more thing to write and to read."""
    if not isinstance(w2, tuple):
        return w2, None
    first, second = w2
    (c, r), d = first.shape, second.shape[1]
    if c * d > 2 * r * (c + d):
        return w2
    dtype = wide(torch.promote_types(first.dtype, second.dtype))
    return first.to(dtype) @ second.to(dtype), None


def _factors(w2: Factors) -> tuple[Tensor, ...]:
    return w2 if isinstance(w2, tuple) else (w2,)


def _by_autograd(x: Tensor, w1: Tensor, w2: Factors) -> bool:
    """Whether PyTorch is to see plain operations."""
    return torch.compiler.is_compiling() or not alone() or not is_plain(x, w1, *_factors(w2))


def _forward(x: Tensor, w1: Tensor, first: Tensor, second: Tensor | None, scaling: float) -> Tensor:
    y = _term(x, w1, first, second, scaling)
    return y.reshape(*x.shape[:-1], y.shape[1] * y.shape[2])


def _add(
    y: Tensor, x: Tensor, w1: Tensor, first: Tensor, second: Tensor | None, scaling: float
) -> Tensor:
    added = _term(x, w1, first, second, scaling)
    y.view(added.shape).add_(added)
    return y


def _term(x: Tensor, w1: Tensor, first: Tensor, second: Tensor | None, scaling: float) -> Tensor:
    """What is added, ``[M, a, c]``, laid out as ``[a, M, c]``: products over M and c at once, without a
    copy of what is between them."""
    dtype = wide(torch.promote_types(x.dtype, w1.dtype))
    z = _by_block(x, w1.shape[1], dtype)
    if second is not None:
        z = _times(z, second.t())
    z = _times(z, first.t())
    b, M, c = z.shape
    y = (w1.to(dtype) * scaling) @ z.reshape(b, M * c)
    return y.reshape(y.shape[0], M, c).transpose(0, 1)


def _by_block(t: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """``t [..., count·n]`` as ``[count, M, n]``, a view if it has the dtype."""
    n = t.shape[-1] // count
    # Of explicit sizes: -1 has no batching rule for no rows.
    M = math.prod(t.shape[:-1])
    return t.reshape(M, count, n).to(dtype).transpose(0, 1)


def _times(z: Tensor, factor: Tensor) -> Tensor:
    """``z·factor`` of ``z [b, M, n]``, laid out so."""
    return torch.bmm(z, factor.to(z.dtype).expand(z.shape[0], *factor.shape))


class _AddKronecker(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        w1: Tensor,
        first: Tensor,
        second: Tensor | None,
        scaling: float,
    ) -> Tensor:
        keep_x = any(ctx.needs_input_grad[2:5])
        ctx.save_for_backward(x if keep_x else None, w1, first, second)
        ctx.scaling, ctx.shape, ctx.dtype = scaling, x.shape, x.dtype
        ctx.mark_dirty(y)
        return _add(y, x, w1, first, second, scaling)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(dy):
            return dy if ctx.needs_input_grad[0] else None, *_AddKronecker._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, first, second = ctx.saved_tensors
        _, need_dx, need_dw1, need_dfirst, need_dsecond, _ = ctx.needs_input_grad
        dtype = wide(torch.promote_types(ctx.dtype, w1.dtype))
        a, b = w1.shape
        M, c = math.prod(ctx.shape[:-1]), first.shape[0]
        # Widened and laid out in one pass.
        rows = dy.reshape(M, a, c).transpose(0, 1)
        rows = rows.to(dtype, memory_format=torch.contiguous_format).reshape(a, M * c)
        dz = ((w1.to(dtype) * ctx.scaling).t() @ rows).reshape(b, M, c)
        dx = dw1 = dfirst = dsecond = None
        low = dz if second is None else _times(dz, first)
        if x is not None:
            blocks = _by_block(x, b, dtype)
            before = blocks if second is None else _times(blocks, second.t())
            if need_dw1:
                z = _times(before, first.t()).reshape(b, M * c)
                dw1 = ((rows @ z.t()) * ctx.scaling).to(w1.dtype)
            if need_dfirst:
                dfirst = _sum_over_blocks(dz, before).to(first.dtype)
            if need_dsecond:
                dsecond = _sum_over_blocks(low, blocks).to(second.dtype)
        if need_dx:
            dx = _times(low, first if second is None else second).transpose(0, 1)
            dx = dx.to(ctx.dtype, memory_format=torch.contiguous_format).reshape(ctx.shape)
        return dx, dw1, dfirst, dsecond, None


def _sum_over_blocks(dz: Tensor, x: Tensor) -> Tensor:
    """``Σ dzᵀ·x [c, d]`` of ``dz [b, M, c]`` and ``x [b, M, d]``: over the rows of each block, then over
    the blocks. One long sum in float32 is less exact."""
    return torch.bmm(dz.transpose(1, 2), x).sum(0)


# As that of lora_linear.
_apply = super(torch.autograd.Function, _AddKronecker).apply
