"""The DoRA linear layer, made of ``lora_linear``: what is scaled, what is dropped, in which dtype."""

import torch.nn.functional as F
from torch import Tensor

from lorafast.operands import Weight
from lorafast.ops.dropout import dropout
from lorafast.ops.lora_linear import lora_linear
from lorafast.ops.scaled import scaled


def dora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``y = x·Wᵀ + (scale − 1) ⊙ left·Wᵀ + scale ⊙ scaling · (left·Aᵀ)·Bᵀ + bias``, ``left = drop(x)``.

    As ``functional.dora_linear``, on checked arguments outside autocast, with ``scale [N]`` for
    ``magnitude / weight_norm`` and the seed of the mask given. Without dropout ``left`` is x, and one
    ``lora_linear`` is scaled. With it ``scale`` is folded into B, so that x is read once by the fused
    layer, and W once more by what is left of x.
    """
    if not dropout_p:
        y = lora_linear(x, weight, lora_A, lora_B, scaling)
        return scaled(y, scale, bias)
    scaled_B = scale.unsqueeze(1) * lora_B
    A = lora_A.to(scaled_B.dtype)
    y = lora_linear(x, weight, A, scaled_B, scaling, bias, dropout_p, seed)
    frozen = frozen_linear(dropout(x, dropout_p, seed), weight)
    return scaled(frozen, scale - 1, y)


def around_float16(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The same of a float16 layer with float32 adapters: all but the product with W is float32, for
    neither what an adapter makes nor its gradients need fit into float16."""
    left = dropout(x.to(lora_A.dtype), dropout_p, seed)
    beside = bias
    if dropout_p:
        frozen = frozen_linear(left, weight.to(left.dtype))
        beside = frozen_linear(x, weight, bias) - frozen
    else:
        frozen = frozen_linear(x, weight)
    y = (frozen + F.linear(F.linear(left, lora_A), lora_B) * scaling) * scale
    return (y if beside is None else y + beside).to(x.dtype)


def frozen_linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """``x·Wᵀ + bias``, differentiable in ``x``."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    # As a layer whose adapter is zero: PyTorch would keep W made dense for the backward.
    N, K = weight.shape
    return lora_linear(x, weight, x.new_zeros((1, K)), x.new_zeros((N, 1)), 1.0, bias)
