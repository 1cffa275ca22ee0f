"""Policy and reference: one mixed forward, two forwards, one plain forward of as many rows."""

from lorafast.bench.preference.job import ARMS, Row, Size, describe, measure, run

__all__ = ["ARMS", "Row", "Size", "describe", "measure", "run"]
