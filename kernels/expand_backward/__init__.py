"""``ds = scaling · dy·B`` and ``dB = scaling · dyᵀ·s``."""

from lorafast.kernels.expand_backward.kernel import expand_backward

__all__ = ["expand_backward"]
