"""``‖W + scaling · B·A‖`` of each row, DoRA's norm."""

from lorafast.kernels.weight_norm.kernel import weight_norm

__all__ = ["weight_norm"]
