"""The LoRA linear layer, composed of the reference operations."""

from torch import Tensor

from lorafast.reference.linear_expand import linear_expand
from lorafast.reference.shrink import shrink


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
    activations: Tensor | None = None,
) -> Tensor:
    """``y = x·Wᵀ + scaling · (drop(x)·Aᵀ)·Bᵀ + bias`` (Hu et al., "LoRA", 2021).

    Shapes: ``x [..., K]``, ``weight [N, K]``, ``lora_A [r, K]``, ``lora_B [N, r]``, ``bias [N]`` →
    ``y [..., N]``. Dropout needs ``seed``, an int64 tensor of one element. Differentiable by
    PyTorch's own autograd, any number of times. ``activations``: what W multiplies, if that is not x.
    """
    N = weight.shape[0]
    rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    if not training:
        dropout_p = 0.0
    if dropout_p > 0.0 and seed is None:
        raise ValueError("seed is None: dropout needs an int64 tensor of one element")
    s = shrink(rows, lora_A, dropout_p, seed)
    multiplied = rows if activations is None else activations.reshape(rows.shape)
    y = linear_expand(multiplied, weight, s, lora_B, scaling, bias)
    return y.view(*x.shape[:-1], N)
