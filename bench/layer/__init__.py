"""The one table: what a LoRA linear layer costs over the frozen one that it adapts."""

from lorafast.bench.layer.drawing import plot, sweep
from lorafast.bench.layer.job import run
from lorafast.bench.layer.report import format_rows
from lorafast.bench.layer.timing import Row, measure

__all__ = ["Row", "format_rows", "measure", "plot", "run", "sweep"]
