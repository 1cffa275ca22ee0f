"""Neighbours of this package, a folder each; none is imported before it is asked for."""

from lorafast.integrations.drop_in import accelerate, accelerated, explain, restore
from lorafast.integrations.warm_up import warm_up

__all__ = ["accelerate", "accelerated", "explain", "restore", "warm_up"]
