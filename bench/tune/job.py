"""Climbs for each case's fastest configuration, sets it against ``aten``, keeps the winner.

What is found is written at once to the user's records (``kernels/tables/tuned.py``), where calls find
it from then on. A run that was interrupted goes on where it was.
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from lorafast.bench.common.check import raised
from lorafast.bench.common.clock import Clock, Summary, clock_for, interleave
from lorafast.bench.common.output import UnwritableError
from lorafast.bench.common.problem import DTYPES, Problem, draw
from lorafast.bench.common.progress import progress, say
from lorafast.bench.common.record import Record
from lorafast.bench.operations.cases import CASES, Case, cases
from lorafast.bench.operations.job import as_is, on_backend, turn_of, why_wrong
from lorafast.bench.tune import climb
from lorafast.kernels.common.configs import INTERPRETER_PROCESSORS, LaunchConfig
from lorafast.kernels.tables import tuned
from lorafast.kernels.tables.find import WHOLE

from lorafast.ops import on_gpu, roofline

_MARGIN = 0.99
"""A fused kernel must be this much faster than ``aten``: noise must not choose it."""


@dataclass
class Row:
    """A case's winner; samples are seconds by backend, round by round."""

    problem: Problem
    case: str
    backend: str
    config: dict[str, Any] | None  # the fields of a LaunchConfig
    tried: int
    wrong: str | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)


def run(
    problems: Sequence[Problem],
    *,
    device: torch.device,
    seconds: float,
    record: Record | None = None,
    again: bool = False,
    deadline: float = float("inf"),
) -> list[Row]:
    """Tunes every case of every problem that has no record yet, about ``seconds`` each.

    With ``again`` also those that have one. None begins after ``deadline``.

    Raises:
        UnwritableError: what is found can't be kept.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else tuned.INTERPRETER
    try:
        tuned.prepare(name)
    except OSError as error:
        raise UnwritableError(f"what is found can't be kept: {error}") from None
    known = {entry.key: entry for entry in tuned.load(name)}
    clock = clock_for(device)
    rows = []
    todo = [(problem, case) for problem in problems for case in CASES]
    for problem, case_name in progress(todo, "case"):
        tensors = draw(problem, device, 1)
        case = cases(problem, tensors)[case_name]
        if case.key in known and not again:
            say(f"  {problem}, {case_name}: known, {known[case.key].backend}")
            continue
        if case.operation in WHOLE and not _rides(case.operation, problem, device):
            say(f"  {problem}, {case_name}: its operations one by one, nothing can ride")
            continue
        if time.monotonic() > deadline:
            say(f"  {problem}, {case_name}: not begun, the time is up")
            if record is not None:
                record.skip(f"tune: {problem}, {case_name}")
            continue
        row = tune(problem, case, known, device=device, clock=clock, seconds=seconds)
        rows.append(row)
        medians = {backend: Summary.of(s).median for backend, s in row.samples.items()}
        config = None if row.config is None else LaunchConfig(**row.config)
        known[case.key] = tuned.Record(case.key, row.backend, config, medians)
        try:
            path = tuned.save(name, [known[case.key]])
        except OSError as error:
            raise UnwritableError(f"what was found can't be kept: {error}") from None
        if record is not None:
            record.add("tune", [row])
        say(f"  {problem}, {case_name}: {_verdict(row, medians)}")
    if rows:
        say(f"recorded in {path}")
    return rows


def tune(
    problem: Problem,
    case: Case,
    known: dict[tuned.Key, tuned.Record],
    *,
    device: torch.device,
    clock: Clock,
    seconds: float,
) -> Row:
    """The fastest of the case's configurations against ``aten``, or against its parts' winners."""
    deadline = time.monotonic() + 0.8 * seconds
    found = climb.climb(problem, case, device=device, clock=clock, deadline=deadline)
    best = min(found, key=lambda row: 1.0 if row.shipped else row.ratio)
    config = LaunchConfig(**best.config)
    fused = climb.with_config(case.operation, config)
    dtype = DTYPES[problem.dtype]
    try:
        wrong = why_wrong(case, fused, dtype)
    except Exception as error:  # what ships can't run here: PyTorch can, and the others go on
        wrong = raised(error)
    others = on_backend("aten")
    if case.operation in WHOLE:
        others = _one_by_one(case, problem, known, device)
    turns = {
        name: turn_of([functools.partial(case.call, operations, as_is)])
        for name, operations in (("triton", fused), ("aten", others))
        if name == "aten" or wrong is None
    }
    samples = interleave(clock, turns, seconds=0.2 * seconds, least=15)
    wins = wrong is None and Summary.of_ratio(samples["triton"], samples["aten"]).median < _MARGIN
    backend = "triton" if wins else "aten"
    return Row(problem, case.name, backend, asdict(config), len(found), wrong, samples)


def _rides(operation: str, problem: Problem, device: torch.device) -> bool:
    shape, dtype = problem.shape, DTYPES[problem.dtype]
    sizes = (dtype.itemsize, DTYPES[problem.adapter_dtype].itemsize, problem.dropout_p > 0.0)
    processors = INTERPRETER_PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    seen = roofline.Problem(shape.M, shape.K, shape.N, problem.r, *sizes)
    return on_gpu.rides(operation, seen, dtype, climb.capability_of(device), processors)


_PARTS = {
    "lora_linear": ("shrink", "linear_expand"),
    "lora_linear_backward": ("expand_backward", "shrink_backward", "dx"),
}


def _one_by_one(
    case: Case, problem: Problem, known: dict[tuned.Key, tuned.Record], device: torch.device
) -> SimpleNamespace:
    """A whole layer's operations as they are chosen one by one, with what they were tuned to."""
    namespace = SimpleNamespace(**vars(on_backend("aten")))
    every = cases(problem, draw(problem, device, 1))
    for name in _PARTS[case.operation]:
        part = every[name]
        winner = known.get(part.key)
        # The launchers find the tuned configurations themselves.
        if winner is not None and winner.backend == "triton":
            setattr(namespace, part.operation, getattr(on_backend("triton"), part.operation))
    return namespace


def _verdict(row: Row, medians: dict[str, float]) -> str:
    if row.wrong is not None:
        return f"WRONG: {row.wrong}"
    times = ", ".join(f"{name} {value * 1e6:,.1f} µs" for name, value in medians.items())
    return f"{row.backend} ({times}; {row.tried} configurations)"
