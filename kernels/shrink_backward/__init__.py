"""``dA = dsᵀ·drop(x)``."""

from lorafast.kernels.shrink_backward.kernel import shrink_backward

__all__ = ["shrink_backward"]
