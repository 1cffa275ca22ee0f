"""Times each operation on each backend, in turn with a copy of x and ``torch.mm``, the bare GEMM."""

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from lorafast.bench.common.check import raised
from lorafast.bench.common.clock import Call, Clock, Summary, Turn, clock_for, interleave
from lorafast.bench.common.problem import DTYPES, Problem, Tensors, draw, input_sets
from lorafast.bench.common.progress import progress, say
from lorafast.bench.common.record import Record
from lorafast.bench.common.table import table, why_no_time
from lorafast.bench.operations.cases import Case, cases
from torch import Tensor

from lorafast.backends import registry
from lorafast.backends.plan import Refusal
from lorafast.ops.problems import by_backend, on_backend
from lorafast.reference import contract

COPY, PRODUCT = "copy of x", "torch.mm"
_HEADER = ("", "", "time", "middle half", "TFLOP/s", "GB/s", "of copy", "of mm")


@dataclass
class Row:
    """One operation on one backend; samples are seconds, beside those of the yardsticks."""

    problem: Problem
    case: str
    contender: str
    flops: float
    least_bytes: int
    wrong: str | None = None
    unavailable: str | None = None
    samples: list[float] = field(default_factory=list)
    copy_samples: list[float] = field(default_factory=list)
    product_samples: list[float] = field(default_factory=list)


def as_is(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The ``cast`` of a call that is timed: its tensors have the dtypes already."""
    return tensor


def why_wrong(case: Case, operations: Any, dtype: torch.dtype) -> str | None:
    """What the numerical contract says against an operation, or None."""
    return contract.compare(case.call, operations, dtype).why_broken


def why_unavailable(case: Case, backend: str) -> str | None:
    """Why a backend can't serve a case, or None."""
    answer = registry.plan_of(backend, case.asks)
    return answer.reason if isinstance(answer, Refusal) else None


def turn_of(calls: Sequence[Call]) -> Turn:
    """Calls that need no preparation, one for each input set."""

    @contextmanager
    def turn(index: int) -> Iterator[Call]:
        yield calls[index % len(calls)]

    return turn


def measure(
    problem: Problem,
    backends: Sequence[str],
    *,
    device: torch.device,
    clock: Clock,
    seconds: float,
) -> list[Row]:
    """Rows of every operation on every backend, and of each backend's alternatives.

    Each operation is sampled for about ``seconds``: its backends, a copy of x and ``torch.mm`` in turn.
    """
    tensors = draw(problem, device, input_sets(problem))
    by_set = [
        cases(problem, replace(tensors, x=[x], dy=[dy]))
        for x, dy in zip(tensors.x, tensors.dy, strict=True)
    ]
    rows = []
    for name, case in by_set[0].items():
        turns = _yardsticks(tensors)
        of_case = []
        contenders: dict[str, SimpleNamespace | None] = {}
        for backend in backends:
            contenders[backend] = None
            if why_unavailable(case, backend) is None:
                contenders[backend] = on_backend(backend)
                for said, other in registry.get(backend).alternatives(case.asks).items():
                    contenders[f"{backend}, {said}"] = by_backend(other)
        for contender, operations in contenders.items():
            row = Row(problem, name, contender, case.flops, case.least_bytes)
            of_case.append(row)
            if operations is None:
                row.unavailable = why_unavailable(case, contender)
                continue
            try:
                row.wrong = why_wrong(case, operations, DTYPES[problem.dtype])
            except (
                Exception
            ) as error:  # it is the backend's, reported with it, and the others go on
                row.wrong = raised(error)
            if row.wrong is None:
                turns[contender] = turn_of(
                    [functools.partial(c[name].call, operations, as_is) for c in by_set]
                )
        samples = interleave(clock, turns, seconds=seconds)
        for row in of_case:
            row.samples = samples.get(row.contender, [])
            row.copy_samples, row.product_samples = samples[COPY], samples[PRODUCT]
        rows += of_case
    return rows


def _yardsticks(tensors: Tensors) -> dict[str, Turn]:
    """A copy of x, and the bare product of the forward."""
    weight, x0 = tensors.weight, tensors.x[0]
    copy, y = torch.empty_like(x0), x0.new_empty((x0.shape[0], weight.shape[0]))
    return {
        COPY: turn_of([functools.partial(copy.copy_, x) for x in tensors.x]),
        PRODUCT: turn_of([functools.partial(torch.mm, x, weight.t(), out=y) for x in tensors.x]),
    }


def run(
    problems: Sequence[Problem],
    backends: Sequence[str],
    *,
    device: torch.device,
    seconds: float,
    record: Record,
    deadline: float = float("inf"),
) -> list[Row]:
    """The rows of all problems, printed and kept in ``record``; none begins after ``deadline``."""
    clock = clock_for(device)
    rows: list[Row] = []
    for problem in progress(problems, "problem"):
        if time.monotonic() > deadline:
            say(f"\n{problem}: not measured, the time is up")
            record.skip(f"operations: {problem}")
            continue
        found = measure(problem, backends, device=device, clock=clock, seconds=seconds)
        record.add("operations", found)
        rows += found
        say(f"\n{problem}\n{format_rows(found)}")
    return rows


def format_rows(rows: Sequence[Row]) -> str:
    """A line for each operation and backend, with its share of the copy's and the product's rate."""
    first = rows[0].problem
    M, K, N = first.shape.M, first.shape.K, first.shape.N
    copied, multiplied = 2 * M * K * first.element_size, 2.0 * M * K * N
    lines = []
    for row in rows:
        cells = [f"  {row.case}", row.contender]
        if row.samples:
            at = Summary.of(row.samples)
            copy = Summary.of_ratio(row.copy_samples, row.samples).median
            product = Summary.of_ratio(row.product_samples, row.samples).median
            cells += [
                f"{at.median * 1e6:,.1f} µs",
                f"{at.low * 1e6:,.1f} – {at.high * 1e6:,.1f}",
                f"{row.flops / at.median / 1e12:.3g}",
                f"{row.least_bytes / at.median / 1e9:,.0f}",
                f"{row.least_bytes / copied * copy:.0%}",
                f"{row.flops / multiplied * product:.0%}",
            ]
        lines.append(cells)
    copy_time = Summary.of(rows[0].copy_samples).median
    product_time = Summary.of(rows[0].product_samples).median
    remarks = [why_no_time(row.wrong, row.unavailable) for row in rows]
    return "\n".join(
        [
            table(_HEADER, lines, left=2, remarks=remarks),
            f"copy: x copied at {copied / copy_time / 1e9:,.0f} GB/s; "
            f"mm: torch.mm at {multiplied / product_time / 1e12:.3g} TFLOP/s, in the same rounds",
        ]
    )
