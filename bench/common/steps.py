"""Training steps of a network by several arms: what is kept of each, and how it is said."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from lorafast.bench.common.clock import Call, Timed, Turn
from lorafast.bench.common.table import markdown, megabytes, table, why_no_time

_HEADER = ("", "step", "middle half", "over frozen", "middle half", "peak MB")


@dataclass(kw_only=True)
class Arm(Timed):
    """Samples are seconds of a step, ``peak_bytes`` what a step allocates at most."""

    contender: str
    wrong: str | None = None
    unavailable: str | None = None
    samples: list[float] = field(default_factory=list)
    frozen_samples: list[float] = field(default_factory=list)
    peak_bytes: int | None = None


_Arm = TypeVar("_Arm", bound=Arm)


def turn(step: Callable[[], None]) -> Turn:
    """``step`` whenever it is its turn, whatever the input set."""

    @contextmanager
    def entered(index: int) -> Iterator[Call]:
        yield step

    return entered


def format_rows(rows: Sequence[Arm]) -> str:
    """A line for each arm."""
    remarks = [why_no_time(row.wrong, row.unavailable) for row in rows]
    return table(_HEADER, list(map(_cells, rows)), remarks=remarks)


def _cells(row: Arm) -> tuple[str, ...]:
    time, overhead = row.time, row.overhead
    if time is None or overhead is None:
        return (f"  {row.contender}",)
    return (
        f"  {row.contender}",
        f"{time.median * 1e3:.4g} ms",
        f"{time.low * 1e3:.4g} – {time.high * 1e3:.4g} ms",
        f"{overhead.median:.3f}",
        f"{overhead.low:.3f} – {overhead.high:.3f}",
        megabytes(row.peak_bytes),
    )


def paragraphs(rows: Sequence[_Arm], describe: Callable[[_Arm], str]) -> list[str]:
    """Of a page: a sentence and a table for each network that ``describe`` tells apart; an arm in each
    line, the median and in brackets the middle half of its overhead over the frozen network."""
    found = []
    for described, same in itertools.groupby(rows, key=describe):
        header = ["", "step", "over frozen", "peak MB"]
        found += [f"{described}:", markdown(header, [_markdown_cells(row) for row in same])]
    return found


def _markdown_cells(row: Arm) -> list[str]:
    time, overhead = row.time, row.overhead
    if time is None or overhead is None:
        return [row.contender, why_no_time(row.wrong, row.unavailable) or "not run", "", ""]
    spread = f"**{overhead.median:.3f}** ({overhead.low:.3f} – {overhead.high:.3f})"
    step = f"{time.median * 1e3:.4g} ms"
    return [row.contender, step, spread, megabytes(row.peak_bytes)]
