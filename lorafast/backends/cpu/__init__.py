"""Native kernels for CPUs."""

from lorafast.backends.cpu.backend import Cpu

__all__ = ["Cpu"]
