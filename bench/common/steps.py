"""Training steps by several arms: how they are measured, what is kept of each, and how it is said."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from lorafast.bench.common import memory
from lorafast.bench.common.check import raised
from lorafast.bench.common.clock import Call, Timed, Turn, clock_for, interleave
from lorafast.bench.common.contenders import FROZEN, UnavailableError
from lorafast.bench.common.progress import progress, say
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
_Made = TypeVar("_Made")


def measure(
    rows: dict[str, _Arm],
    make: Callable[[str], _Made],
    why_wrong: Callable[[str, _Made], str | None],
    step_of: Callable[[str, _Made], Call],
    *,
    device: torch.device,
    seconds: float,
) -> list[_Arm]:
    """Times every arm's step in turn, if nothing is wrong with what ``make`` makes of its name.

    ``rows`` has a row for each name, which is filled in; ``FROZEN`` is among them. All together are
    sampled for about ``seconds``.
    """
    arms: dict[str, _Made] = {}
    for name in progress(list(rows), "arm"):
        made = attempt(rows[name], partial(make, name), partial(why_wrong, name))
        if made is not None:
            arms[name] = made
    steps = {name: step_of(name, made) for name, made in arms.items()}
    turns = {name: turn(step) for name, step in steps.items()}
    samples = interleave(clock_for(device), turns, seconds=seconds, least=5, most=100)
    for name, times in samples.items():
        rows[name].samples, rows[name].frozen_samples = times, samples[FROZEN]
        rows[name].peak_bytes = memory.peak_bytes(steps[name], device)
    return list(rows.values())


def attempt(
    row: Arm, make: Callable[[], _Made], why_wrong: Callable[[_Made], str | None]
) -> _Made | None:
    """What ``make`` makes; None where it can't or where it is wrong, and then ``row`` says why."""
    try:
        made = make()
        row.wrong = why_wrong(made)
    except UnavailableError as error:
        row.unavailable = str(error)
        return None
    except Exception as error:  # it is the arm's, reported with it, and the others go on
        row.wrong = raised(error)
    return made if row.wrong is None else None


def turn(step: Call) -> Turn:
    """``step`` whenever it is its turn, whatever the input set."""

    @contextmanager
    def entered(index: int) -> Iterator[Call]:
        yield step

    return entered


def show(rows: Sequence[_Arm], describe: Callable[[_Arm], str]) -> None:
    """Prints what the rows have in common, and a line for each."""
    say(f"\n{describe(rows[0])}")
    say(format_rows(rows))


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
