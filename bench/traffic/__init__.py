"""Bytes and launches of a LoRA linear layer, counted instead of timed: the same on every machine."""

from lorafast.bench.traffic import bottlenecks, convolutions, relatives
from lorafast.bench.traffic.job import Row, measure, run

__all__ = ["Row", "bottlenecks", "convolutions", "measure", "relatives", "run"]
