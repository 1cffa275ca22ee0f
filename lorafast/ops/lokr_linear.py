"""LoKr: a product with ``w1 ⊗ w2`` is two small ones over x as ``[M, b, d]``, and it is never made.

``z = x·w2ᵀ [M, b, c]``, then ``w1·z [M, a, c]``.

x is kept for the backward, which makes z again. All is computed in the wider dtype of x and the adapter,
float16 in float32: neither z nor its gradient need fit into it.
"""

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
    y = frozen_linear(x, weight, bias)
    return (y + kronecker(x, w1, w2, scaling)).to(x.dtype)


def kronecker(x: Tensor, w1: Tensor, w2: Factors, scaling: float) -> Tensor:
    """``scaling · x·(w1 ⊗ w2)ᵀ [..., a·c]`` of ``x [..., b·d]``, ``w1 [a, b]``, ``w2 [c, d]``.

    In the wider dtype of x and the adapter, float32 for float16, which the caller rounds.
    ``w2`` is a matrix, or ``[c, r]`` and ``[r, d]``, of which it is the product.
    """
    first, second = w2 if isinstance(w2, tuple) else (w2, None)
    plain = torch.compiler.is_compiling() or not alone() or not is_plain(x, w1, first, second)
    if plain or not torch.is_grad_enabled():
        return _forward(x, w1, first, second, scaling)
    found: Tensor = _apply(x, w1, first, second, scaling)
    return found


def _blocks(t: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """``t [..., count·n]`` as ``[M, count, n]``."""
    return t.reshape(-1, count, t.shape[-1] // count).to(dtype)


def _forward(x: Tensor, w1: Tensor, first: Tensor, second: Tensor | None, scaling: float) -> Tensor:
    dtype = wide(torch.promote_types(x.dtype, w1.dtype))
    z = _blocks(x, w1.shape[1], dtype)
    for factor in (second, first):
        if factor is not None:
            z = z @ factor.to(dtype).t()
    y = torch.matmul(w1.to(dtype) * scaling, z)
    return y.reshape(*x.shape[:-1], y.shape[1] * y.shape[2])


class _Kronecker(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, first: Tensor, second: Tensor | None, scaling: float
    ) -> Tensor:
        keep_x = any(ctx.needs_input_grad[1:4])
        ctx.save_for_backward(x if keep_x else None, w1, first, second)
        ctx.scaling, ctx.shape, ctx.dtype = scaling, x.shape, x.dtype
        return _forward(x, w1, first, second, scaling)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(dy):
            return _Kronecker._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, first, second = ctx.saved_tensors
        need_dx, need_dw1, need_dfirst, need_dsecond, _ = ctx.needs_input_grad
        dtype = dy.dtype
        scaled_w1 = w1.to(dtype) * ctx.scaling
        dz = torch.matmul(scaled_w1.t(), _blocks(dy, w1.shape[0], dtype))  # [M, b, c]
        dx = dw1 = dfirst = dsecond = None
        low = dz if second is None else dz @ first.to(dtype)
        if x is not None:
            blocks = _blocks(x, w1.shape[1], dtype)
            before = blocks if second is None else blocks @ second.to(dtype).t()
            if need_dw1:
                z = before @ first.to(dtype).t()
                dw1 = _sum_of_products(_blocks(dy, w1.shape[0], dtype), z) * ctx.scaling
                dw1 = dw1.to(w1.dtype)
            if need_dfirst:
                dfirst = _sum_over_blocks(dz, before).to(first.dtype)
            if need_dsecond:
                dsecond = _sum_over_blocks(low, blocks).to(second.dtype)
        if need_dx:
            dx = low @ (first if second is None else second).to(dtype)
            dx = dx.reshape(ctx.shape).to(ctx.dtype)
        return dx, dw1, dfirst, dsecond, None


def _sum_over_blocks(dz: Tensor, x: Tensor) -> Tensor:
    """``Σ dzᵀ·x [c, d]`` of ``dz [M, b, c]`` and ``x [M, b, d]``: over the rows of each block, then over
    the blocks. One long sum in float32 is less exact."""
    return torch.bmm(dz.permute(1, 2, 0), x.transpose(0, 1)).sum(0)


def _sum_of_products(dy: Tensor, z: Tensor) -> Tensor:
    """``Σ dy·zᵀ [a, b]`` over all rows and columns: ``dy [M, a, c]``, ``z [M, b, c]``."""
    # Of explicit sizes: flatten has no batching rule for is_grads_batched, and -1 none for no rows.
    M, a, c = dy.shape
    b = z.shape[1]
    return dy.transpose(0, 1).reshape(a, M * c) @ z.transpose(0, 1).reshape(b, M * c).t()


# As that of lora_linear.
_apply = super(torch.autograd.Function, _Kronecker).apply
