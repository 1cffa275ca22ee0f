"""``ds = scaling · dy·B`` and ``dB = scaling · dyᵀ·s``."""

from torch import Tensor

from lorafast.core.dtypes import wide


def expand_backward(dy: Tensor, s: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """``ds = scaling · dy·B`` and ``dB = scaling · dyᵀ·s``.

    Shapes: ``dy [M, N]``, ``s [M, r]``, ``lora_B [N, r]`` → ``ds [M, r]`` in the dtype of ``s``
    (that of ``dy``, float32 for float16), ``dB [N, r]`` in the dtype of ``lora_B``.
    """
    low = wide(dy.dtype)
    dy = dy.to(low)
    ds = scaling * (dy @ lora_B.to(low))
    dB = scaling * (dy.t() @ s)
    return ds, dB.to(lora_B.dtype)
