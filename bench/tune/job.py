"""Climbs for each case's fastest configuration, sets it against the other backends, keeps the winner.

What is found is written at once to the user's records (``kernels/tables/tuned.py``), where calls find
it from then on. A run that was interrupted goes on where it was.
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
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
from lorafast.bench.tune.choices import Chosen, choices_of
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.tables import tuned

from lorafast.backends import registry
from lorafast.backends.cost import MARGIN, Device, key_of
from lorafast.backends.cuda import Cuda
from lorafast.backends.plan import Plan, Refusal
from lorafast.backends.triton import Triton, device_of
from lorafast.backends.triton.cost import helped
from lorafast.backends.triton.planning import rule_of

TUNED = tuple(case for case in CASES if case != "lora_linear_backward")
"""The cases with a launch of their own: a layer's backward is its parts."""


@dataclass
class Row:
    """A case's winner; samples are seconds by backend, round by round. ``config`` is of Triton's
    kernels, ``choices`` are of those in CUDA C++."""

    problem: Problem
    case: str
    backend: str
    config: dict[str, Any] | None
    tried: int
    wrong: str | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)
    choices: dict[str, int] | None = None


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
    todo = [(problem, case) for problem in problems for case in TUNED]
    gpu = device_of(device)
    assert gpu is not None, f"{device} has no kernels to tune"
    try:
        tuned.prepare(gpu.name)
    except OSError as error:
        raise UnwritableError(f"what is found can't be kept: {error}") from None
    known = {entry.key: entry for entry in tuned.load(gpu.name)}
    clock = clock_for(device)
    rows = []
    path = None
    for problem, case_name in progress(todo, "case"):
        case = cases(problem, draw(problem, device, 1))[case_name]
        key = key_of(case.asks)
        if key in known and not again:
            say(f"  {problem}, {case_name}: known, {known[key].backend}")
            continue
        if case.operation == "lora_linear" and not _in_one_launch(case):
            why = _why_no_climb(case, gpu)
            if why is not None:
                say(f"  {problem}, {case_name}: its operations one by one, {why}")
                continue
        if time.monotonic() > deadline:
            say(f"  {problem}, {case_name}: not begun, the time is up")
            if record is not None:
                record.skip(f"tune: {problem}, {case_name}")
            continue
        row = tune(problem, case, device=gpu, clock=clock, seconds=seconds)
        rows.append(row)
        if not row.samples:
            say(f"  {problem}, {case_name}: {_verdict(row, {})}")
            continue
        medians = {backend: Summary.of(s).median for backend, s in row.samples.items()}
        config = None if row.config is None else LaunchConfig(**row.config)
        known[key] = tuned.Record(key, row.backend, config, medians, row.choices)
        try:
            path = tuned.save(gpu.name, [known[key]])
        except OSError as error:
            raise UnwritableError(f"what was found can't be kept: {error}") from None
        registry.forget_plans()
        if record is not None:
            record.add("tune", [row])
        say(f"  {problem}, {case_name}: {_verdict(row, medians)}")
    if path is not None:
        say(f"recorded in {path}")
    return rows


def tune(problem: Problem, case: Case, *, device: Device, clock: Clock, seconds: float) -> Row:
    """The fastest of the case's configurations of Triton and of CUDA C++ against the other backends. Who
    is wrong isn't timed."""
    begin = time.monotonic()
    contenders = {name: on_backend(name) for name in _able(case)}
    found: list[climb.Row] = []
    config: LaunchConfig | None = None
    if _why_no_climb(case, device) is None:
        of = climb.OfTriton(case, device)
        share = 0.5 if Cuda.name in contenders else 0.8
        found = climb.climb(problem, case, of, clock=clock, deadline=begin + share * seconds)
        config = LaunchConfig(**climb.best_of(found).config)
        contenders[Triton.name] = of.operations(config)
    choices: dict[str, int] | None = None
    of_cuda = choices_of(case, device) if Cuda.name in contenders else None
    if of_cuda is not None:
        tried = climb.climb(problem, case, of_cuda, clock=clock, deadline=begin + 0.8 * seconds)
        best = Chosen(**climb.best_of(tried).config)
        contenders[Cuda.name] = of_cuda.operations(best)
        choices, found = dict(best.choices), [*found, *tried]
    wrong = {}
    for name, operations in contenders.items():
        try:
            reason = why_wrong(case, operations, DTYPES[problem.dtype])
        except Exception as error:  # what ships can't run here: PyTorch can, and the others go on
            reason = raised(error)
        if reason is not None:
            wrong[name] = reason
    turns = {
        name: turn_of([functools.partial(case.call, operations, as_is)])
        for name, operations in contenders.items()
        if name not in wrong
    }
    samples = interleave(clock, turns, seconds=0.2 * seconds, least=15)
    said = "; ".join(f"{name}: {reason}" for name, reason in wrong.items()) or None
    fields = None if config is None else asdict(config)
    return Row(problem, case.name, _winner(samples), fields, len(found), said, samples, choices)


def _winner(samples: dict[str, list[float]]) -> str:
    """The fastest; Triton only if its lead is no noise."""
    others = {name: Summary.of(s).median for name, s in samples.items() if name != Triton.name}
    best = min(others, key=others.__getitem__, default=Triton.name)
    if best == Triton.name or Triton.name not in samples:
        return best
    lead = Summary.of_ratio(samples[Triton.name], samples[best]).median
    return Triton.name if lead < 1 / MARGIN else best


def _able(case: Case) -> list[str]:
    """The backends that can serve the case, but for the definition itself."""
    return [
        name
        for name in registry.names()
        if not registry.get(name).plain_pytorch
        and isinstance(registry.plan_of(name, case.asks), Plan)
    ]


def _why_no_climb(case: Case, device: Device) -> str | None:
    """Why Triton has no configurations to try for the case, or None."""
    answer = registry.plan_of(Triton.name, case.asks)
    if isinstance(answer, Refusal):
        return answer.reason
    if case.operation != "lora_linear":
        return None
    together = helped(case.asks, device, rule_of(case.asks, device))
    return f"no helpers: {together}" if isinstance(together, str) else None


def _in_one_launch(case: Case) -> bool:
    """Whether another backend than Triton serves a whole layer in one launch, chosen by its time."""
    plans = (registry.plan_of(name, case.asks) for name in _able(case) if name != Triton.name)
    return any(
        isinstance(plan, Plan) and len(plan.launches) == 1 and plan.seconds is not None
        for plan in plans
    )


def _verdict(row: Row, medians: dict[str, float]) -> str:
    if row.wrong is not None:
        return f"WRONG: {row.wrong}"
    times = ", ".join(f"{name} {value * 1e6:,.1f} µs" for name, value in medians.items())
    hybrid = "; triton's is hybrid" if row.config is not None and row.config["hybrid"] else ""
    return f"{row.backend} ({times}; {row.tried} configurations{hybrid})"
