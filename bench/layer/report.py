"""Rows of measurements as text."""

import itertools
from collections.abc import Iterable, Sequence

from lorafast.bench.common.problem import PASSES
from lorafast.bench.common.table import megabytes, why_no_time
from lorafast.bench.layer.timing import Row

_COLUMNS = (  # heading, width
    ("time", 9), ("middle half", 19), ("overhead", 8), ("middle half", 13), ("limit", 5),
    ("TFLOP/s", 7), ("GB/s", 5), ("peak MB", 7), ("saved MB", 8),
)  # fmt: skip
NOTES = """\
overhead: time over that of the frozen nn.Linear, median of single rounds; limit: what arithmetic allows
TFLOP/s: the layer's own arithmetic over its time; GB/s: every operand moved once, over its time
peak: allocated during the call; saved: kept by the forward for the backward (x included)"""
BASE_NOTE = """\
over a quantized base the frozen layer has the same weight dense; peft: over bitsandbytes' layer of the
same codes, in training mode, in which they stay as they are"""


def _aligned(first: str, cells: Sequence[str]) -> str:
    columns = (cell.rjust(width) for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
    return "  ".join((first.ljust(19), *columns))


HEADER = _aligned("", [name for name, _ in _COLUMNS])


def format_rows(rows: Iterable[Row]) -> str:
    """A heading for each problem and pass, below it a line for each contender."""
    text = []
    for (problem, which), group in itertools.groupby(rows, key=lambda r: (r.problem, r.which)):
        text += ["", f"{problem}  {PASSES[which]}", *map(_line, group)]
    return "\n".join(text)


def _line(row: Row) -> str:
    time, overhead = row.time, row.overhead
    if time is None or overhead is None:
        reason = why_no_time(row.wrong, row.unavailable)
        return f"  {row.contender}  {reason or 'not compared: the frozen layer itself is wrong'}"
    cells = (
        duration(time.median),
        f"{duration(time.low, time.median)} – {duration(time.high, time.median)}",
        f"{overhead.median:.3f}",
        f"{overhead.low:.3f} – {overhead.high:.3f}",
        f"{row.limit:.3f}",
        f"{row.problem.flops(row.which, row.adapted) / time.median / 1e12:.3g}",
        f"{row.problem.least_bytes(row.which, row.adapted) / time.median / 1e9:.3g}",
        megabytes(row.peak_bytes),
        megabytes(row.saved_bytes),
    )
    return _aligned(f"  {row.contender}", cells)


def duration(seconds: float, scale: float | None = None) -> str:
    """Seconds in milliseconds, or in microseconds where ``scale`` (itself if None) is that small."""
    if (seconds if scale is None else scale) >= 1e-3:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} µs"
