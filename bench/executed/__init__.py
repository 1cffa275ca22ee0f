"""What our GPU kernels execute, counted by a machine that runs their PTX.

It needs no GPU and times nothing.
"""

from lorafast.bench.executed.job import (
    CUDA,
    LAUNCH_UNITS,
    TRITON,
    UNITS,
    Row,
    UnexecutedError,
    alone,
    beside,
    beside_cells,
    check,
    run,
)

__all__ = [
    "CUDA", "LAUNCH_UNITS", "TRITON", "UNITS", "Row", "UnexecutedError", "alone", "beside",
    "beside_cells", "check", "run",
]  # fmt: skip
