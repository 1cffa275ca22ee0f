"""Times each operation on each backend, beside a copy of x and the vendor's bare product."""

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from lorafast.bench.common.clock import Call, Clock, Summary, Turn, clock_for, interleave
from lorafast.bench.common.problem import DTYPES, Problem, Tensors, draw, input_sets
from lorafast.bench.common.progress import progress, say
from lorafast.bench.common.record import Record
from lorafast.bench.common.table import table, why_no_time
from lorafast.bench.operations.cases import Case, cases
from torch import Tensor

from lorafast.ops import backend, dispatch
from lorafast.reference import contract

COPY, PRODUCT = "copy of x", "torch.mm"
_HEADER = ("", "", "time", "middle half", "TFLOP/s", "GB/s", "of copy", "of mm")


@dataclass
class Row:
    """One operation on one backend; samples are seconds."""

    problem: Problem
    case: str
    contender: str
    flops: float
    least_bytes: int
    wrong: str | None = None
    unavailable: str | None = None
    samples: list[float] = field(default_factory=list)

    @property
    def time(self) -> Summary | None:
        """Seconds of a call."""
        return Summary.of(self.samples) if self.samples else None


def on_backend(name: str) -> SimpleNamespace:
    """The four operations of one backend, without the package's own call path before them."""
    functions = {op: backend.BACKENDS[name].implementation(op) for op in dispatch.OPERATIONS}
    return SimpleNamespace(**functions)


def as_is(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The ``cast`` of a call that is timed: its tensors have the dtypes already."""
    return tensor


def why_wrong(case: Case, operations: Any, dtype: torch.dtype) -> str | None:
    """What the numerical contract says against an operation, or None."""
    error, allowed = contract.compare(case.call, operations, dtype)
    return None if error <= allowed else f"off by {error:.1e}, allowed {allowed:.1e}"


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
    """Rows of a copy of x and of the bare product, then of every operation on every backend.

    Each operation is sampled for about ``seconds``, its backends in turn.
    """
    tensors = draw(problem, device, input_sets(problem))
    rows = _yardsticks(problem, tensors, clock, seconds)
    by_set = [
        cases(problem, replace(tensors, x=[x], dy=[dy]))
        for x, dy in zip(tensors.x, tensors.dy, strict=True)
    ]
    for name, case in by_set[0].items():
        turns = {}
        of_case = []
        for backend_name in backends:
            row = Row(problem, name, backend_name, case.flops, case.least_bytes)
            of_case.append(row)
            row.unavailable = dispatch.why_not(backend_name, case.operation, (tensors.x[0],))
            if row.unavailable is None:
                operations = on_backend(backend_name)
                row.wrong = why_wrong(case, operations, DTYPES[problem.dtype])
                if row.wrong is None:
                    turns[backend_name] = turn_of(
                        [functools.partial(c[name].call, operations, as_is) for c in by_set]
                    )
        samples = interleave(clock, turns, seconds=seconds) if turns else {}
        for row in of_case:
            row.samples = samples.get(row.contender, [])
        rows += of_case
    return rows


def _yardsticks(problem: Problem, tensors: Tensors, clock: Clock, seconds: float) -> list[Row]:
    weight, x0 = tensors.weight, tensors.x[0]
    (M, K), N = x0.shape, weight.shape[0]
    copy, y = torch.empty_like(x0), x0.new_empty((M, N))
    turns = {
        COPY: turn_of([functools.partial(copy.copy_, x) for x in tensors.x]),
        PRODUCT: turn_of([functools.partial(torch.mm, x, weight.t(), out=y) for x in tensors.x]),
    }
    samples = interleave(clock, turns, seconds=seconds)
    product_bytes = (M * K + K * N + M * N) * problem.element_size
    return [
        Row(problem, COPY, "", 0.0, 2 * x0.nbytes, samples=samples[COPY]),
        Row(problem, PRODUCT, "", 2.0 * M * K * N, product_bytes, samples=samples[PRODUCT]),
    ]


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
            continue
        found = measure(problem, backends, device=device, clock=clock, seconds=seconds)
        record.add("operations", found)
        rows += found
        say(f"\n{problem}\n{format_rows(found)}")
    return rows


def format_rows(rows: Sequence[Row]) -> str:
    """A line for each operation and backend, with its share of the copy's and the product's rate."""
    rates = {row.case: row for row in rows}
    copy, product = rates[COPY].time, rates[PRODUCT].time
    assert copy is not None
    assert product is not None
    copy_rate = rates[COPY].least_bytes / copy.median
    product_rate = rates[PRODUCT].flops / product.median
    lines = []
    for row in rows:
        cells = [f"  {row.case}", row.contender]
        if row.time is not None:
            at, rate = row.time, row.least_bytes / row.time.median
            cells += [
                f"{at.median * 1e6:,.1f} µs",
                f"{at.low * 1e6:,.1f} – {at.high * 1e6:,.1f}",
                f"{row.flops / at.median / 1e12:.3g}" if row.flops else "",
                f"{rate / 1e9:,.0f}",
                f"{rate / copy_rate:.0%}",
                f"{row.flops / at.median / product_rate:.0%}" if row.flops else "",
            ]
        lines.append(cells)
    remarks = [why_no_time(row.wrong, row.unavailable) for row in rows]
    return table(_HEADER, lines, left=2, remarks=remarks)
