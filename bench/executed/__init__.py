"""What our GPU kernels execute, counted by a machine that runs their PTX.

It needs no GPU and times nothing.
"""

from lorafast.bench.executed.job import (
    CUDA,
    GEMM_HEADER,
    LAUNCH_UNITS,
    TRITON,
    UNITS,
    Row,
    UnexecutedError,
    added,
    alone,
    beside,
    beside_cells,
    check,
    gemm_cells,
    gemms,
    run,
)

__all__ = [
    "CUDA", "GEMM_HEADER", "LAUNCH_UNITS", "TRITON", "UNITS", "Row", "UnexecutedError", "added", "alone",
    "beside", "beside_cells", "check", "gemm_cells", "gemms", "run",
]  # fmt: skip
