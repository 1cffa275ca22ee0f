"""VeLoRA (Miles et al., 2024): a gradient of A that is made of a compressed x, which alone is kept.

With x in G groups of D columns, zeros at the end of the last, and a vector ``v [D]`` of length 1, a row
is kept as ``c = (x_1·v, …, x_G·v)``, and read in the backward as ``x̂ = scale · (c_1·v, …, c_G·v)``:

    dA = dsᵀ·x̂ = scale · (dsᵀ·c) ⊗ v

The second form makes no x̂ ``[M, K]``. All else is LoRA's: one pass, with an A that has no gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import variants as stock
from torch import Tensor

from lorafast.core.context import without_autocast
from lorafast.core.dtypes import wide
from lorafast.integrations.peft.adapters import Adapter


def with_gradient(layer: Any, y: Tensor, left: Tensor, adapter: Adapter) -> Tensor:
    """``y``, of which this adapter was a term with an A without gradient, and with that gradient.

    ``adapter`` is PEFT's own, not what stands in for it; ``left [..., K]`` what its A was multiplied by:
    ``drop(x)``. PEFT's ``v`` may be set by it.
    """
    A, B, name = adapter.lora_A.weight, adapter.lora_B.weight, adapter.name
    left = left.detach().to(A.dtype)
    stock.VeloraLinearVariant._maybe_update_embed(layer, name, left)
    if not A.requires_grad:
        return y
    v = layer.lora_velora_embed[name].to(A.dtype)
    with without_autocast(y):
        c = compressed(left, v, layer.lora_velora_num_groups[name])
        scale = layer.lora_velora_scale[name]
        found: Tensor = _Compressed.apply(y, A, B, c, v, adapter.scaling, scale)
    return found


def compressed(x: Tensor, v: Tensor, groups: int) -> Tensor:
    """``c [M, G]`` of ``x [..., K]``."""
    missing = groups * v.numel() - x.shape[-1]
    x = F.pad(x, (0, missing)) if missing else x
    return x.reshape(-1, groups, v.numel()) @ v


class _Compressed(torch.autograd.Function):
    """``y`` itself. B has no gradient of it, but that of A is made of B, and has one."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, A: Tensor, B: Tensor, c: Tensor, v: Tensor, scaling: Any, scale: float
    ) -> Tensor:
        ctx.save_for_backward(B, c, v)
        ctx.K, ctx.dtype, ctx.scaling, ctx.scale = A.shape[1], A.dtype, scaling, scale
        # Not a view: autograd forbids to change in place what a Function returns as one.
        return torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        B, c, v = ctx.saved_tensors
        dtype = wide(ctx.dtype)
        with without_autocast(dy):
            ds = (dy.reshape(-1, dy.shape[-1]).to(dtype) @ B.to(dtype)) * ctx.scaling
            of_groups = ds.t() @ c.to(dtype)
            dA = (of_groups.unsqueeze(-1) * (ctx.scale * v.to(dtype))).flatten(1)[:, : ctx.K]
        return dy, dA.to(ctx.dtype), None, None, None, None, None
