"""LoRA with vectors on both sides and between, made of ``lora_linear``: the vectors go into A and B.

``d_in ⊙ x`` and ``d_out ⊙ y`` would be passes over x and y. A and B are small: ``A' = A ⊙ d_in`` and
``B' = d_out ⊙ B ⊙ m`` are made anew in each call, and the gradients of the vectors are sums over those
of A' and B'. float16 adapters go on in float32: A' and B' with their gradients need not fit into it.
"""

from typing import Any

import torch
from torch import Tensor

from lorafast.core.context import alone, without_autocast
from lorafast.core.dtypes import wide
from lorafast.core.problem import is_plain
from lorafast.operands import Weight
from lorafast.ops.lora_linear import lora_linear


def scaled_lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    d_in: Tensor | None = None,
    m: Tensor | None = None,
    d_out: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``y = x·Wᵀ + scaling · d_out ⊙ ((((d_in ⊙ drop(x))·Aᵀ) ⊙ m)·Bᵀ) + bias``.

    As ``functional.scaled_lora_linear``, on checked vectors outside autocast, with the seed of the mask
    given. ``x`` is kept for the backward only if ``lora_A`` or ``d_in`` needs a gradient.
    """
    A, B = folded(lora_A, lora_B, d_in, m, d_out)
    return lora_linear(x, weight, A, B, scaling, bias, dropout_p, seed)


def folded(
    lora_A: Tensor,
    lora_B: Tensor,
    d_in: Tensor | None = None,
    m: Tensor | None = None,
    d_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``A ⊙ d_in [r, K]`` and ``d_out ⊙ B ⊙ m [N, r]`` (``d_out ⊙ B·m`` for ``m [r, r]``).

    Rounded once, to the dtype of the adapter, or float32 for float16.
    """
    dtype = wide(lora_A.dtype)
    if m is not None and m.dim() == 2:
        sums = torch.promote_types(lora_B.dtype, m.dtype)
        lora_B, m = lora_B.to(sums) @ m.to(sums), None
    return times(lora_A, None, d_in, dtype), times(lora_B, d_out, m, dtype)


def times(t: Tensor, rows: Tensor | None, columns: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``rows ⊙ t ⊙ columns`` in ``dtype``: ``t [n, m]``, ``rows [n]``, ``columns [m]``, each or None.

    Keeps its arguments for the backward, and no product.
    """
    if rows is None and columns is None:
        return t.to(dtype)
    plain = torch.compiler.is_compiling() or not alone() or not is_plain(t, rows, columns)
    if plain or not torch.is_grad_enabled():
        return _product(t, rows, columns).to(dtype)
    found: Tensor = _apply(t, rows, columns, dtype)
    return found


def _product(t: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """In float32 at least."""
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    if rows is not None:
        t = t * rows.unsqueeze(1)
    return t if columns is None else t * columns


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, t: Tensor, rows: Tensor | None, columns: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        of_vector = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(t if of_vector else None, rows, columns)
        ctx.dtype = t.dtype
        return _product(t, rows, columns).to(dtype)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        with without_autocast(d):
            return (*_Times._gradients(ctx, d), None)

    @staticmethod
    def _gradients(ctx: Any, d: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        t, rows, columns = ctx.saved_tensors
        need_dt, need_drows, need_dcolumns, _ = ctx.needs_input_grad
        d = d.to(torch.promote_types(d.dtype, torch.float32))
        dt = drows = dcolumns = None
        if need_dt:
            dt = _product(d, rows, columns).to(ctx.dtype)
        if need_drows or need_dcolumns:
            # By sums, not by a matrix times a vector: that adds thousands of terms one after another.
            product = d * t
            if need_drows:
                drows = (product if columns is None else product * columns).sum(1).to(rows.dtype)
            if need_dcolumns:
                dcolumns = product if rows is None else product * rows.unsqueeze(1)
                dcolumns = dcolumns.sum(0).to(columns.dtype)
        return dt, drows, dcolumns


# As that of lora_linear.
_apply = super(torch.autograd.Function, _Times).apply
