"""``y = l ⊙ (x·Wᵀ + b)`` or ``y = (l ⊙ x)·Wᵀ + b``, a frozen layer with a vector, and its backward."""

from lorafast.kernels.scaled_linear.backward import scaled_dx, scaled_linear_backward, scaled_pass
from lorafast.kernels.scaled_linear.kernel import scaled_linear

__all__ = ["scaled_dx", "scaled_linear", "scaled_linear_backward", "scaled_pass"]
