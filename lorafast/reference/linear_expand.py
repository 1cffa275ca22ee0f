"""``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias``."""

from torch import Tensor

from lorafast.core.dtypes import wide
from lorafast.reference.expand import expand


def linear_expand(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias``.

    Shapes: ``x [M, K]``, ``weight [N, K]``, ``s [M, r]``, ``lora_B [N, r]``, ``bias [N]`` →
    ``y [M, N]``, in the dtype of ``x``; ``s`` in that of ``shrink``, as the low-rank term, until it is
    added. ``transposed``: ``y = x·W + …`` for ``weight [K, N]``.

    The forward has no mask here (``shrink`` has it). The backward does: ``dx`` is this operation,
    transposed, on ``(dy, W, ds, Aᵀ)``, whose low-rank term passes back through the dropout of ``x``.
    """
    low_rank = expand(s, lora_B, scaling, dropout_p, seed, dtype=wide(x.dtype))
    y = x @ (weight if transposed else weight.t()) + low_rank
    return (y if bias is None else y + bias).to(x.dtype)
