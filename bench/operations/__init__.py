"""Each operation by itself: what the kernels reach, backend by backend."""

from lorafast.bench.operations.cases import CASES, Case
from lorafast.bench.operations.job import Row, measure, run

__all__ = ["CASES", "Case", "Row", "measure", "run"]
