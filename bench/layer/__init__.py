"""The one table: what a LoRA linear layer costs over the frozen one that it adapts."""

from lorafast.bench.layer.measure import Row, measure
from lorafast.bench.layer.plot import plot, sweep
from lorafast.bench.layer.report import format_rows
from lorafast.bench.layer.run import run

__all__ = ["Row", "format_rows", "measure", "plot", "run", "sweep"]
