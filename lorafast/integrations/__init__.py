"""Neighbours of this package, a folder each; none is imported before it is asked for."""

from lorafast.integrations.drop_in import accelerate, accelerated, explain, restore

__all__ = ["accelerate", "accelerated", "explain", "restore"]
