"""What a call costs when there is next to nothing to compute: Python and dispatch alone."""

from lorafast.bench.call_overhead.job import PASSES, measure, run

__all__ = ["PASSES", "measure", "run"]
