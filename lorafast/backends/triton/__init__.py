"""Fused kernels in Triton."""

from lorafast.backends.triton.backend import Triton

__all__ = ["Triton"]
