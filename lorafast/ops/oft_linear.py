"""OFT: x is rotated block by block, then meets the frozen weight. The rotation is never a matrix of W's
size, and x is kept for the backward in its own dtype."""

from typing import Any

import torch
from torch import Tensor

from lorafast.core.context import alone, without_autocast
from lorafast.core.problem import is_plain
from lorafast.operands import Weight
from lorafast.ops.dora_linear import frozen_linear


def oft_linear(x: Tensor, weight: Weight, blocks: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = (x·diag(R_1 … R_b))·Wᵀ + bias``, on checked arguments outside autocast."""
    return frozen_linear(rotated(x, blocks), weight, bias)


def rotated(x: Tensor, blocks: Tensor, *, few: bool = False) -> Tensor:
    """``x·diag(R_1 … R_b)`` in the dtype of x: ``x [..., b·k]``, ``blocks [b, k, k]``.

    Computed in the wider dtype of the two. PyTorch differentiates it itself where x has that dtype, and
    is kept as it is anyway, and of a ``few`` rows, which takes the host less time.
    """
    is_wide = torch.promote_types(x.dtype, blocks.dtype) is x.dtype
    plain = few or is_wide or torch.compiler.is_compiling() or not alone()
    plain = plain or not is_plain(x, blocks)
    if plain or not torch.is_grad_enabled():
        return _times(x, blocks)
    found: Tensor = _apply(x, blocks)
    return found


def _by_block(t: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """``t [..., b·k]`` as ``[b, M, k]``, a view if it has the dtype."""
    b, k, _ = like.shape
    return t.reshape(-1, b, k).to(dtype).transpose(0, 1)


def _times(t: Tensor, blocks: Tensor) -> Tensor:
    dtype = torch.promote_types(t.dtype, blocks.dtype)
    return _times_by_block(t, _by_block(t, blocks, dtype), blocks.to(dtype))


def _times_by_block(t: Tensor, by_block: Tensor, blocks: Tensor) -> Tensor:
    """``t·diag(blocks)`` as t is laid out; ``by_block [b, M, k]`` is t in the blocks' dtype."""
    found = torch.bmm(by_block, blocks).transpose(0, 1)
    # Rounded and laid out in one pass.
    return found.to(t.dtype, memory_format=torch.contiguous_format).reshape(t.shape)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, blocks)
        return _times(x, blocks)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        with without_autocast(dy):
            return _Rotated._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, blocks = ctx.saved_tensors
        need_dx, need_dblocks = ctx.needs_input_grad
        dtype = torch.promote_types(dy.dtype, blocks.dtype)
        of_dy = _by_block(dy, blocks, dtype)
        dx = dblocks = None
        if need_dx:
            dx = _times_by_block(dy, of_dy, blocks.transpose(1, 2).to(dtype))
        if need_dblocks:
            of_x = _by_block(x, blocks, dtype).transpose(1, 2)
            dblocks = torch.bmm(of_x, of_dy).to(blocks.dtype)
        return dx, dblocks


# As that of lora_linear.
_apply = super(torch.autograd.Function, _Rotated).apply
