"""LoRA's relatives over one linear layer: PEFT's, stock and accelerated."""

from lorafast.bench.relatives.drawing import plot
from lorafast.bench.relatives.job import Row, measure, paragraphs, run
from lorafast.bench.relatives.kinds import KINDS

__all__ = ["KINDS", "Row", "measure", "paragraphs", "plot", "run"]
