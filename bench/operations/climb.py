"""Looks for a faster launch configuration of a Triton kernel on this device, neighbour by neighbour."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace

import torch
from lorafast.bench.common.check import raised
from lorafast.bench.common.clock import Clock, Summary, clock_for, interleave
from lorafast.bench.common.problem import DTYPES, Problem, draw
from lorafast.bench.common.progress import progress, say
from lorafast.bench.common.record import Record
from lorafast.bench.operations.cases import Case, cases
from lorafast.bench.operations.job import as_is, on_backend, turn_of, why_wrong
from lorafast.kernels.common.configs import LaunchConfig, config_for, why_invalid

_BLOCKS = {
    "shrink": ("block_m", "block_k"),
    "linear_expand": ("block_m", "block_n", "block_k"),
    "expand_backward": ("block_m", "block_n"),
    "shrink_backward": ("block_m", "block_k"),
}


@dataclass
class Row:
    """One configuration of an operation; ``unusable`` says why it has no samples (seconds)."""

    problem: Problem
    case: str
    config: dict[str, int]
    shipped: bool
    wrong: str | None = None
    unusable: str | None = None
    samples: list[float] = field(default_factory=list)
    shipped_samples: list[float] = field(default_factory=list)

    @property
    def against_shipped(self) -> Summary | None:
        """Time over that of the shipped configuration, round by round."""
        return Summary.of_ratio(self.samples, self.shipped_samples) if self.samples else None

    @property
    def ratio(self) -> float:
        """The median of that; infinite for what can't be used."""
        return float("inf") if self.against_shipped is None else self.against_shipped.median


def neighbours(
    operation: str, config: LaunchConfig, element_size: int, capability: int
) -> Iterator[LaunchConfig]:
    """Valid configurations that differ in one field: halved, doubled, or a stage more or less."""
    fields = (*_BLOCKS[operation], "num_warps")
    changes = [{name: getattr(config, name) * 2} for name in fields]
    changes += [{name: getattr(config, name) // 2} for name in fields]
    changes += [{"num_stages": config.num_stages + step} for step in (1, -1)]
    for change in changes:
        candidate = replace(config, **change)
        if why_invalid(operation, candidate, element_size, capability) is None:
            yield candidate


def climb(
    problem: Problem, name: str, *, device: torch.device, clock: Clock, deadline: float
) -> list[Row]:
    """The shipped configuration and those tried, until none nearby is faster or time is up."""
    tensors = draw(problem, device, 1)
    case = cases(problem, tensors)[name]
    capability = _capability(device)
    shipped = config_for(case.operation, problem.r, problem.element_size)
    rows = {shipped: Row(problem, name, asdict(shipped), True)}
    best = shipped
    while True:
        tried = False
        for candidate in neighbours(case.operation, best, problem.element_size, capability):
            if candidate in rows:
                continue
            if time.monotonic() > deadline:
                return list(rows.values())
            rows[candidate] = _try(problem, case, candidate, shipped, clock)
            tried = True
        faster = min(rows, key=lambda config: 1.0 if config == shipped else rows[config].ratio)
        if faster == best or not tried:
            return list(rows.values())
        best = faster


def _capability(device: torch.device) -> int:
    """As in ``sm_90``; the interpreter takes every configuration that this one takes."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _try(
    problem: Problem,
    case: Case,
    candidate: LaunchConfig,
    shipped: LaunchConfig,
    clock: Clock,
    seconds: float = 0.1,
) -> Row:
    row = Row(problem, case.name, asdict(candidate), False)
    try:
        row.wrong = why_wrong(case, _with_config(case.operation, candidate), DTYPES[problem.dtype])
        if row.wrong is None:
            turns = {
                label: turn_of(
                    [functools.partial(case.call, _with_config(case.operation, config), as_is)]
                )
                for label, config in (("candidate", candidate), ("shipped", shipped))
            }
            samples = interleave(clock, turns, seconds=seconds, least=15)
            row.samples, row.shipped_samples = samples["candidate"], samples["shipped"]
    except (
        Exception
    ) as error:  # too large for the chip, or the compiler gives up: not this one then
        row.unusable = raised(error)
    return row


def _with_config(operation: str, config: LaunchConfig) -> SimpleNamespace:
    operations = on_backend("triton")
    launcher: Callable[..., object] = getattr(operations, operation)
    setattr(operations, operation, functools.partial(launcher, config=config))
    return operations


def run(
    problem: Problem,
    names: Sequence[str],
    *,
    device: torch.device,
    seconds: float,
    record: Record,
) -> list[Row]:
    """Climbs for ``seconds`` on each operation named; prints the best and keeps all in ``record``."""
    clock = clock_for(device)
    rows: list[Row] = []
    say(f"\nlaunch configurations for {problem}")
    for name in progress(names, "operation"):
        deadline = time.monotonic() + seconds
        found = climb(problem, name, device=device, clock=clock, deadline=deadline)
        best = min(found, key=lambda row: row.ratio)
        if best.ratio < 1:
            # The least of many noisy medians flatters: once more, with samples of its own.
            best = _again(problem, name, best, device, clock)
            found.append(best)
        record.add("configurations", found)
        rows += found
        say(f"  {name}: {len(found)} tried, {_verdict(best)}")
    return rows


def _again(problem: Problem, name: str, row: Row, device: torch.device, clock: Clock) -> Row:
    case = cases(problem, draw(problem, device, 1))[name]
    shipped = config_for(case.operation, problem.r, problem.element_size)
    return _try(problem, case, LaunchConfig(**row.config), shipped, clock, seconds=0.5)


def _verdict(best: Row) -> str:
    against = best.against_shipped
    if against is None or against.high >= 1:
        return "none surely faster than the shipped one"
    return (
        f"{against.median:.3f} ({against.low:.3f} – {against.high:.3f}) of the shipped one's time: "
        f"{best.config}"
    )
