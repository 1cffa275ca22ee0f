"""``y = residual + scale · (f(h·Dᵀ + d)·Uᵀ + u)``, a bottleneck adapter, and its backward."""

from lorafast.kernels.bottleneck.backward import bottleneck_backward
from lorafast.kernels.bottleneck.kernel import bottleneck

__all__ = ["bottleneck", "bottleneck_backward"]
