"""``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias``."""

from lorafast.kernels.linear_expand.kernel import linear_expand

__all__ = ["linear_expand"]
