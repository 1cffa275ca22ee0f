"""``ds = scaling · dy·B`` and ``dB = scaling · dyᵀ·s``."""

import torch
from torch import Tensor

from lorafast.core.dtypes import wide


def expand_backward(dy: Tensor, s: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """``ds = scaling · dy·B`` and ``dB = scaling · dyᵀ·s``.

    Shapes: ``dy [M, N]``, ``s [M, r]``, ``lora_B [N, r]`` → ``ds [M, r]`` in the dtype of ``s``
    (that of ``dy``, float32 for float16), ``dB [N, r]`` in the dtype of ``lora_B``.
    """
    return expand_ds(dy, lora_B, scaling), expand_dB(dy, s, scaling, lora_B.dtype)


def expand_ds(dy: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """``ds = scaling · dy·B``."""
    low = wide(dy.dtype)
    return scaling * (dy.to(low) @ lora_B.to(low))


def expand_dB(dy: Tensor, s: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """``dB = scaling · dyᵀ·s`` in ``dtype``."""
    return (scaling * (dy.to(wide(dy.dtype)).t() @ s)).to(dtype)
