"""What our GPU kernels execute, counted by a machine that runs their PTX.

It needs no GPU and times nothing.
"""

from lorafast.bench.executed.job import UNITS, Row, UnexecutedError, check, run

__all__ = ["UNITS", "Row", "UnexecutedError", "check", "run"]
