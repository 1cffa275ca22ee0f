"""A layer's forward: helper CTAs shrink x beside the GEMM."""

from lorafast.kernels.lora_linear.forward import lora_linear

__all__ = ["lora_linear"]
