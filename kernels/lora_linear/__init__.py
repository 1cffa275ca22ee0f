"""A whole layer's forward and backward, the skinny operations beside the GEMM."""

from lorafast.kernels.lora_linear.backward import lora_linear_backward
from lorafast.kernels.lora_linear.forward import lora_linear

__all__ = ["lora_linear", "lora_linear_backward"]
