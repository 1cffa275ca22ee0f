"""``dA = dsᵀ·drop(x)``."""

import torch
from torch import Tensor

from lorafast.reference.dropout import dropout


def shrink_backward(
    ds: Tensor,
    x: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``dA = dsᵀ·drop(x)``.

    Shapes: ``ds [M, r]``, ``x [M, K]`` → ``dA [r, K]`` in ``dtype`` (that of ``x`` if None).
    """
    return (ds.t() @ dropout(x, dropout_p, seed)).to(dtype or x.dtype)
