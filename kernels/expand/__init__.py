"""``y = scaling · drop'(s·Bᵀ)``."""

from lorafast.kernels.expand.kernel import expand

__all__ = ["expand"]
