"""``y = drop(scaling · s·Bᵀ)``."""

from lorafast.kernels.expand.kernel import expand

__all__ = ["expand"]
