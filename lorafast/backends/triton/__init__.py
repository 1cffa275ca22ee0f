"""Fused kernels in Triton."""

from lorafast.backends.triton.backend import Triton, device_of

__all__ = ["Triton", "device_of"]
