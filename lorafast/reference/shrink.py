"""``s = drop(x)·Aᵀ``."""

from torch import Tensor

from lorafast.core.dtypes import wide
from lorafast.reference.dropout import dropout


def shrink(x: Tensor, lora_A: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """``s = drop(x)·Aᵀ``.

    Shapes: ``x [M, K]``, ``lora_A [r, K]`` → ``s [M, r]``, in the dtype of ``x``
    (float32 for float16: ``wide``).
    """
    low = wide(x.dtype)
    return dropout(x.to(low), dropout_p, seed) @ lora_A.to(low).t()
