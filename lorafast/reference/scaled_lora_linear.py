"""The LoRA linear layer with vectors on both sides and between, composed of the reference operations."""

from torch import Tensor

from lorafast.core.dtypes import wide
from lorafast.reference.expand import expand
from lorafast.reference.shrink import shrink


def scaled_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    d_in: Tensor | None = None,
    m: Tensor | None = None,
    d_out: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    """``y = x·Wᵀ + scaling · d_out ⊙ ((((d_in ⊙ drop(x))·Aᵀ) ⊙ m)·Bᵀ) + bias``.

    With ``m [r, r]``, a matrix between A and B, ``s·mᵀ`` for ``s ⊙ m``. A vector that is None is ones.

    Shapes: ``x [..., K]``, ``weight [N, K]``, ``lora_A [r, K]``, ``lora_B [N, r]``, ``d_in [K]``,
    ``m [r]`` or ``[r, r]``, ``d_out [N]``, ``bias [N]`` → ``y [..., N]`` in the dtype of ``x``. Dropout
    needs ``seed``, an int64 tensor of one element. Differentiable by PyTorch's own autograd.
    """
    N = weight.shape[0]
    rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    if not training:
        dropout_p = 0.0
    if dropout_p > 0.0 and seed is None:
        raise ValueError("seed is None: dropout needs an int64 tensor of one element")
    s = shrink(rows if d_in is None else rows * d_in.to(x.dtype), lora_A, dropout_p, seed)
    if m is not None:
        s = s * m.to(s.dtype) if m.dim() == 1 else s @ m.to(s.dtype).t()
    added = expand(s, lora_B, scaling, dtype=wide(x.dtype))
    y = rows @ weight.t() + (added if d_out is None else d_out * added)
    return (y if bias is None else y + bias).to(x.dtype).view(*x.shape[:-1], N)
