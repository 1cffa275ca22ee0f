"""The reference operations, served as a backend."""

from lorafast.backends.reference.backend import Reference, operation

__all__ = ["Reference", "operation"]
