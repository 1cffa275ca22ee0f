"""The fastest backend and launch configuration for each call, measured on the user's device."""

from lorafast.bench.tune.job import Row, run

__all__ = ["Row", "run"]
