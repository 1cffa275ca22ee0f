"""The reference operations, served as a backend."""

from lorafast.backends.reference.backend import Reference

__all__ = ["Reference"]
