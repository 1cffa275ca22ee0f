"""Native kernels for CPUs."""

from lorafast.backends import convolution
from lorafast.backends.cpu.backend import Cpu
from lorafast.backends.cpu.conv_shrink import kernels

__all__ = ["Cpu"]

convolution.serve_by("cpu", Cpu.name, kernels)
