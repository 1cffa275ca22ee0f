"""An attention network's training step: adapters, PEFT's, the frozen network, full fine-tuning."""

from lorafast.bench.attention.job import ARMS, Row, Size, describe, measure, run

__all__ = ["ARMS", "Row", "Size", "describe", "measure", "run"]
