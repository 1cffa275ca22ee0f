"""The fastest composition of PyTorch's own calls."""

from lorafast.backends.aten.backend import Aten

__all__ = ["Aten"]
