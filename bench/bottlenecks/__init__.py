"""A bottleneck adapter behind a feed-forward: ours, plain PyTorch's, AdapterHub's, full fine-tuning."""

from lorafast.bench.bottlenecks.job import ARMS, SIZES, Row, Size, describe, measure, run

__all__ = ["ARMS", "SIZES", "Row", "Size", "describe", "measure", "run"]
