"""``drop(x)`` as a tensor, with the mask of ``shrink``: for what multiplies it by more than A."""

import torch
from torch import Tensor

from lorafast.ops import unstrided
from lorafast.ops.expand import expand
from lorafast.reference.dropout import survivor_scale


def dropout(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """``drop(x)``: each element of ``x [..., K]`` zero, or divided by the probability to keep it.

    Differentiable. The mask is what ``expand`` makes of ones, where every backend draws it.
    """
    if not dropout_p or seed is None:
        return x
    if unstrided.is_sharded(x):
        return unstrided.drop_sharded(x, dropout_p, seed).to(x.dtype)
    K = x.shape[-1]
    one = x.new_ones((1, 1), dtype=torch.bfloat16)
    M = x.numel() // K if K else 0
    mask = expand(one.expand(M, 1), one.expand(K, 1), 1.0, dropout_p, seed, dtype=one.dtype)
    return torch.where((mask != 0).view(x.shape), x * survivor_scale(dropout_p), 0.0)
