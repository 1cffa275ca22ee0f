"""Looks for a faster way to launch a backend's kernels on this device, neighbour by neighbour.

``Climber`` is what a backend must say for that; Triton's is here, that of the CUDA C++ kernels in
``choices.py``.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Protocol

from lorafast.bench.common.check import raised
from lorafast.bench.common.clock import Clock, Summary, interleave
from lorafast.bench.common.problem import DTYPES, Problem
from lorafast.bench.operations.cases import Case
from lorafast.bench.operations.job import as_is, turn_of, why_wrong
from lorafast.kernels.common.configs import LaunchConfig, why_invalid
from lorafast.kernels.tables.find import GEMMS, nearest_architecture

from lorafast.backends.cost import Device
from lorafast.backends.triton import Triton
from lorafast.backends.triton.cost import helped
from lorafast.backends.triton.planning import HybridLaunch, hybrid_rule_of, plan_hybrid, rule_of
from lorafast.core.problem import Problem as Call
from lorafast.ops.problems import by_backend

_PRODUCT = ("block_m", "block_n", "block_k")
_BLOCKS = {
    "shrink": ("block_m", "block_k", "ctas_per_sm"),
    "expand": ("block_m", "block_n", "ctas_per_sm"),
    "linear_expand": (*_PRODUCT, "parts", "ctas_per_sm"),
    "expand_backward": ("block_m", "block_n", "ctas_per_sm"),
    "shrink_backward": ("block_m", "block_k", "ctas_per_sm"),
    "lora_linear": (*_PRODUCT, "parts", "helpers"),
}


@dataclass
class Row:
    """One configuration of an operation; ``unusable`` says why it has no samples (seconds)."""

    problem: Problem
    case: str
    config: dict[str, Any]
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


class Climber(Protocol):
    """A backend whose launches of a case have configurations, dataclasses, to choose from."""

    shipped: Any
    """What it takes where nothing was tuned."""
    others: Sequence[Any]
    """What else to begin with: further from the first than its neighbours are."""

    def neighbours(self, config: Any) -> Iterator[Any]:
        """Valid ones that differ from ``config`` in one field."""

    def operations(self, config: Any) -> SimpleNamespace:
        """The backend's operations, those of the case launched so."""


class OfTriton:
    """A case's launch configurations of the Triton kernels."""

    def __init__(self, case: Case, device: Device) -> None:
        self.case, self.device = case, device
        self.capability = nearest_architecture(device.capability)
        self.shipped = rule_of(case.asks, device)
        hybrid = hybrid_of(case.asks, device)
        self.others: Sequence[LaunchConfig] = () if hybrid is None else (hybrid,)

    def neighbours(self, config: LaunchConfig) -> Iterator[LaunchConfig]:
        case = self.case
        found = neighbours(case.operation, config, case.asks.dtype.itemsize, self.capability)
        return (candidate for candidate in found if _serves(case.asks, candidate, self.device))

    def operations(self, config: LaunchConfig) -> SimpleNamespace:
        return by_backend(Triton(config))


def neighbours(
    operation: str, config: LaunchConfig, element_size: int, capability: int
) -> Iterator[LaunchConfig]:
    """Valid configurations that differ in one field: halved, doubled, a stage more or less, the other
    way; a product under a mask is written in other parts. A hybrid one has the tiles of ``expand``."""
    fields = (*_BLOCKS["expand" if config.hybrid else operation], "num_warps")
    changes: list[dict[str, Any]] = [{name: getattr(config, name) * 2} for name in fields]
    changes += [{name: getattr(config, name) // 2} for name in fields]
    changes += [{"num_stages": config.num_stages + step} for step in (1, -1)]
    if operation in GEMMS and not config.hybrid:
        operation = "linear_expand"
        changes += [{"masked_parts": config.masked_parts * 2}]
        changes += [{"masked_parts": config.masked_parts // 2}]
        if config.descriptors:
            changes += [{"flatten": not config.flatten}]
    for change in changes:
        candidate = replace(config, **change)
        if candidate != config and not why_invalid(operation, candidate, element_size, capability):
            yield candidate


def climb(problem: Problem, case: Case, of: Climber, *, clock: Clock, deadline: float) -> list[Row]:
    """What is shipped and what was tried, until none nearby is faster or time is up."""
    shipped = of.shipped
    rows: dict[Any, Row] = {shipped: Row(problem, case.name, asdict(shipped), True)}
    best = shipped
    for other in of.others:
        if time.monotonic() <= deadline:
            rows[other] = measure(problem, case, of, other, clock)
    while True:
        tried = False
        for candidate in of.neighbours(best):
            if candidate in rows:
                continue
            if time.monotonic() > deadline:
                return list(rows.values())
            rows[candidate] = measure(problem, case, of, candidate, clock)
            tried = True
        faster = min(rows, key=lambda config: 1.0 if config == shipped else rows[config].ratio)
        if faster == best or not tried:
            return list(rows.values())
        best = faster


def best_of(rows: Sequence[Row]) -> Row:
    """The fastest; the shipped one where none is."""
    return min(rows, key=lambda row: 1.0 if row.shipped else row.ratio)


def _serves(call: Call, candidate: LaunchConfig, device: Device) -> bool:
    """Whether a layer is one launch by a configuration of its own: else its operations would be timed,
    all in the tiles of a GEMM."""
    return call.operation != "lora_linear" or not isinstance(helped(call, device, candidate), str)


def hybrid_of(call: Call, device: Device) -> LaunchConfig | None:
    """The configuration by which two launches serve the call, if they can."""
    if call.operation != "linear_expand":
        return None
    hybrid = hybrid_rule_of(call, device)
    return hybrid if isinstance(plan_hybrid(call, device, hybrid), HybridLaunch) else None


def measure(
    problem: Problem, case: Case, of: Climber, candidate: Any, clock: Clock, seconds: float = 0.1
) -> Row:
    """Checks a configuration, then times it and the shipped one in turn."""
    row = Row(problem, case.name, asdict(candidate), False)
    try:
        row.wrong = why_wrong(case, of.operations(candidate), DTYPES[problem.dtype])
        if row.wrong is None:
            turns = {
                label: turn_of([functools.partial(case.call, of.operations(config), as_is)])
                for label, config in (("candidate", candidate), ("shipped", of.shipped))
            }
            samples = interleave(clock, turns, seconds=seconds, least=15)
            row.samples, row.shipped_samples = samples["candidate"], samples["shipped"]
    except (
        Exception
    ) as error:  # too large for the chip, or the compiler gives up: not this one then
        row.unusable = raised(error)
    return row
