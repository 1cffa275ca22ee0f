"""``y = drop(scaling · s·Bᵀ)``."""

import torch
from torch import Tensor

from lorafast.core.dtypes import wide
from lorafast.reference.dropout import dropout


def expand(
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """``y = drop(scaling · s·Bᵀ)``.

    Shapes: ``s [M, r]``, ``lora_B [N, r]`` → ``y [M, N]`` in ``dtype``; ``s`` in ``wide(dtype)``. The
    mask is that of ``y``: with ``(ds, Aᵀ)``, what the low-rank term adds to ``dx``.
    """
    low_rank = scaling * (s @ lora_B.to(wide(dtype)).t())
    return dropout(low_rank, dropout_p, seed).to(dtype)
