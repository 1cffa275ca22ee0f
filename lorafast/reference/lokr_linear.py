"""The LoKr linear layer: the change of W is a Kronecker product, made here."""

import torch
from torch import Tensor

from lorafast.core.dtypes import wide


def lokr_linear(
    x: Tensor,
    weight: Tensor,
    w1: Tensor,
    w2: Tensor | tuple[Tensor, Tensor],
    scaling: float,
    bias: Tensor | None = None,
) -> Tensor:
    """``y = x·(W + scaling · w1 ⊗ w2)ᵀ + bias`` (Yeh et al., "LyCORIS", 2023).

    ``w2`` is a matrix, or a pair of which it is the product. Shapes: ``x [..., b·d]``, ``weight [a·c,
    b·d]``, ``w1 [a, b]``, ``w2 [c, d]`` or ``[c, r]`` and ``[r, d]``, ``bias [a·c]`` → ``y [..., a·c]``
    in the dtype of ``x``. Differentiable by PyTorch's own autograd.
    """
    if isinstance(w2, tuple):
        w2 = w2[0] @ w2[1]
    change = torch.kron(w1, w2) * scaling
    low = torch.promote_types(wide(x.dtype), change.dtype)
    y = x @ weight.t() + x.to(low) @ change.to(low).t()
    return (y if bias is None else y + bias).to(x.dtype)
