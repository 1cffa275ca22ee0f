"""``ds = scaling · dy·B`` and ``dB = scaling · dyᵀ·s``."""

from torch import Tensor


def expand_backward(dy: Tensor, s: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """``ds = scaling · dy·B`` and ``dB = scaling · dyᵀ·s``.

    Shapes: ``dy [M, N]``, ``s [M, r]``, ``lora_B [N, r]`` → ``ds [M, r]`` in the dtype of ``dy``,
    ``dB [N, r]`` in the dtype of ``lora_B``.
    """
    ds = scaling * (dy @ lora_B.to(dy.dtype))
    dB = scaling * (dy.t() @ s)
    return ds, dB.to(lora_B.dtype)
