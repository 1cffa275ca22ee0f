"""Two recorded runs side by side."""

from lorafast.bench.compare.compare import compare

__all__ = ["compare"]
