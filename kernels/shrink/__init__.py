"""``s = drop(x)·Aᵀ``."""

from lorafast.kernels.shrink.kernel import shrink

__all__ = ["shrink"]
