"""W of a quantized weight, dense."""

from lorafast.kernels.dequantize.kernel import dequantize

__all__ = ["dequantize"]
