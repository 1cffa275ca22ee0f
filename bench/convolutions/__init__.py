"""A convolutional network's training step: adapters, PEFT's, the frozen network, full fine-tuning."""

from lorafast.bench.convolutions.job import ARMS, Row, Size, measure, run
from lorafast.bench.convolutions.report import paragraphs

__all__ = ["ARMS", "Row", "Size", "measure", "paragraphs", "run"]
