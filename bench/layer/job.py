"""Measures problem after problem, printing and recording each as it is done."""

import time
from collections.abc import Sequence

import torch
from lorafast.bench.common.clock import clock_for
from lorafast.bench.common.problem import Problem
from lorafast.bench.common.progress import progress, say
from lorafast.bench.common.record import Record
from lorafast.bench.layer.report import BASE_NOTE, HEADER, NOTES, format_rows
from lorafast.bench.layer.timing import Row, measure

from lorafast.core.problem import DENSE


def run(
    problems: Sequence[Problem],
    passes: Sequence[str],
    against: Sequence[str],
    *,
    device: torch.device,
    seconds: float,
    record: Record,
    kind: str = "layer",
    deadline: float = float("inf"),
) -> list[Row]:
    """The rows of all problems, also kept in ``record`` under ``kind``.

    From ``deadline`` (of ``time.monotonic``) on, what is left is named instead of measured.
    """
    clock = clock_for(device)
    rows: list[Row] = []
    say(HEADER)
    for problem in progress(problems, "problem"):
        if time.monotonic() > deadline:
            say(f"\n{problem}: not measured, the time is up")
            record.skip(f"{kind}: {problem}")
            continue
        found = measure(problem, passes, against, device=device, clock=clock, seconds=seconds)
        record.add(kind, found)
        rows += found
        say(format_rows(found))
    say("\n" + NOTES)
    if any(problem.base != DENSE for problem in problems):
        say(BASE_NOTE)
    return rows
