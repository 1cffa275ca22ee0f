"""``scale ⊙ y + beside``, rounded once: with a float32 scale over 16-bit y in one pass each way.

There PyTorch's own product has a float32 result, which another pass rounds, and its backward makes
float32 copies of dy and of its product. Where every result is written in its own dtype at once, an
element moves 20 bytes instead of 46 forward and backward. The ``autograd.Function`` for that takes the
host 30 µs more, so it is for large y on a GPU; on a CPU PyTorch makes the copies all the same.
"""

from typing import Any

import torch
from torch import Tensor

from lorafast.core.context import alone, is_batched
from lorafast.core.problem import is_plain

LARGE = 1 << 22
"""Elements of y from which memory takes longer than the host: 26 bytes each at 4 TB/s. Not measured."""


def scaled(y: Tensor, scale: Tensor, beside: Tensor | None = None, *, fresh: bool = True) -> Tensor:
    """``scale ⊙ y + beside`` in the dtype of ``y``, computed in the dtype that all are promoted to.

    Shapes: ``y [..., N]``, ``scale [N]``, ``beside [N]`` or as ``y``. A ``fresh`` y is one that nobody
    else has: where no gradient may be asked for it is written over.
    """
    if torch.compiler.is_compiling() or not alone() or not is_plain(y, scale, beside):
        return _plain(y, scale, beside)
    if not torch.is_grad_enabled():
        return _into(y if fresh else torch.empty_like(y), y, scale, beside)
    if not _pays(y, scale):
        return _plain(y, scale, beside)
    out: Tensor = _apply(y, scale, beside)
    return out


def _pays(y: Tensor, scale: Tensor) -> bool:
    """Whether the ``autograd.Function`` saves more than it takes."""
    return y.is_cuda and _pays_on_a_gpu(y, scale)


def _pays_on_a_gpu(y: Tensor, scale: Tensor) -> bool:
    """The same there."""
    wider = torch.promote_types(y.dtype, scale.dtype) is not y.dtype
    return wider and y.numel() >= LARGE


def _plain(y: Tensor, scale: Tensor, beside: Tensor | None) -> Tensor:
    """In operations that PyTorch differentiates, batches and traces."""
    found = y * scale if beside is None else torch.addcmul(beside, y, scale)
    return found.to(y.dtype)


def _into(out: Tensor, y: Tensor, scale: Tensor, beside: Tensor | None) -> Tensor:
    if beside is None:
        return torch.mul(y, scale, out=out)
    return torch.addcmul(beside, y, scale, out=out)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor, beside: Tensor | None) -> Tensor:
        need_dy, need_dscale, _ = ctx.needs_input_grad
        ctx.save_for_backward(y if need_dscale else None, scale if need_dy else None)
        ctx.dtypes = y.dtype, scale.dtype
        ctx.of_beside = None if beside is None else (beside.shape, beside.dtype)
        return _into(torch.empty_like(y), y, scale, beside)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        y, scale = ctx.saved_tensors
        need_dy, need_dscale, need_dbeside = ctx.needs_input_grad
        dtype, scale_dtype = ctx.dtypes
        fast = not (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or is_batched(dy)
            or not alone()
            or not is_plain(dy, y, scale)
        )
        of_y = dscale = dbeside = None
        if need_dy:
            of_y = _into(torch.empty_like(dy), dy, scale, None) if fast else (dy * scale).to(dtype)
        if need_dscale:
            wide = torch.promote_types(dtype, scale_dtype)
            if fast:
                # Onto zeros of the wider dtype, in which it is computed then.
                product = torch.addcmul(dy.new_zeros(dy.shape[-1], dtype=wide), dy, y)
            else:
                product = dy.to(wide) * y
            dscale = _over_rows(product).to(scale_dtype)
        if need_dbeside:
            shape, beside_dtype = ctx.of_beside
            dbeside = (dy if shape == dy.shape else _over_rows(dy)).to(beside_dtype)
        return of_y, dscale, dbeside


def _over_rows(t: Tensor) -> Tensor:
    """The sum ``[N]`` over all dimensions but the last."""
    return t if t.dim() == 1 else t.sum(tuple(range(t.dim() - 1)))


# As that of lora_linear.
_apply = super(torch.autograd.Function, _Scaled).apply
