"""What a record says of convolutions, as the paragraphs of a page."""

import itertools
from collections.abc import Sequence

from lorafast.bench.common.table import markdown, megabytes, why_no_time
from lorafast.bench.convolutions.job import Row, describe
from lorafast.bench.layer.report import duration


def paragraphs(rows: Sequence[Row]) -> list[str]:
    """A sentence and a table for each memory format: an arm in each line, the median and in brackets
    the middle half of its overhead over the frozen network."""
    found = []
    for described, same in itertools.groupby(rows, key=describe):
        header = ["", "step", "over frozen", "peak MB"]
        found += [f"{described}:", markdown(header, [_cells(row) for row in same])]
    return found


def _cells(row: Row) -> list[str]:
    time, overhead = row.time, row.overhead
    if time is None or overhead is None:
        return [row.contender, why_no_time(row.wrong, row.unavailable) or "not run", "", ""]
    spread = f"**{overhead.median:.3f}** ({overhead.low:.3f} – {overhead.high:.3f})"
    return [row.contender, duration(time.median), spread, megabytes(row.peak_bytes)]
