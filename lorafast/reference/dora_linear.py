"""The DoRA linear layer, composed of the reference operations."""

from torch import Tensor

from lorafast.core.dtypes import wide
from lorafast.reference.dropout import dropout
from lorafast.reference.expand import expand
from lorafast.reference.shrink import shrink
from lorafast.reference.weight_norm import weight_norm


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    """``y = x·Wᵀ + (m/n − 1) ⊙ left·Wᵀ + m/n ⊙ scaling · (left·Aᵀ)·Bᵀ + bias``, ``left = drop(x)``.

    ``m`` is ``magnitude``, ``n = ‖W + scaling·B·A‖`` the norm of each row (Liu et al., "DoRA", 2024).
    Without dropout that is ``y = m/n ⊙ (x·(W + scaling·B·A)ᵀ) + bias``. With it the frozen layer sees x,
    the change that DoRA makes to it sees what is left of x, as PEFT has it.

    Shapes: ``x [..., K]``, ``weight [N, K]``, ``lora_A [r, K]``, ``lora_B [N, r]``, ``magnitude [N]``,
    ``bias [N]`` → ``y [..., N]`` in the dtype of ``x``. Dropout needs ``seed``, an int64 tensor of one
    element. Differentiable by PyTorch's own autograd; ``n`` is no part of the gradient.
    """
    N = weight.shape[0]
    rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    if not training:
        dropout_p = 0.0
    if dropout_p > 0.0 and seed is None:
        raise ValueError("seed is None: dropout needs an int64 tensor of one element")
    low = wide(x.dtype)
    scale = magnitude / weight_norm(weight, lora_A, lora_B, scaling)
    frozen = dropout(rows.to(low), dropout_p, seed) @ weight.to(low).t()
    adapted = expand(shrink(rows, lora_A, dropout_p, seed), lora_B, scaling, dtype=low)
    y = rows @ weight.t() + (scale - 1) * frozen + scale * adapted
    return (y if bias is None else y + bias).to(x.dtype).view(*x.shape[:-1], N)
