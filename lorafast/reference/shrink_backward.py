"""``dA = dsᵀ·drop(x)``."""

import torch
from torch import Tensor

from lorafast.core.dtypes import wide
from lorafast.reference.dropout import dropout


def shrink_backward(
    ds: Tensor,
    x: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``dA = dsᵀ·drop(x)``.

    Shapes: ``ds [M, r]``, ``x [M, K]`` → ``dA [r, K]`` in ``dtype`` (that of ``x`` if None). ``ds`` is
    float32 for ``x`` in float16.
    """
    dropped = dropout(x.to(wide(x.dtype)), dropout_p, seed)
    return (ds.t() @ dropped).to(dtype or x.dtype)
