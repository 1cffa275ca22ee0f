"""Two recorded runs side by side."""

from lorafast.bench.compare.runs import compare

__all__ = ["compare"]
