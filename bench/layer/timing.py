"""Times every contender of a problem in turn, after checking its results."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lorafast.bench.common import memory
from lorafast.bench.common.clock import Call, Clock, Timed, Turn, interleave
from lorafast.bench.common.contenders import FROZEN, Builder, Contender
from lorafast.bench.common.line_up import line_up
from lorafast.bench.common.problem import Problem, Tensors, draw, input_sets
from torch import Tensor


@dataclass
class Row(Timed):
    """One contender on one problem and pass.

    ``wrong`` says what is wrong with its results, ``unavailable`` why it wasn't run: then there are
    no samples. Samples are seconds; ``peak_bytes`` is over what was held before the call,
    ``saved_bytes`` what the forward keeps for the backward.
    """

    problem: Problem
    which: str
    contender: str
    wrong: str | None = None
    unavailable: str | None = None
    samples: list[float] = field(default_factory=list)
    frozen_samples: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    saved_bytes: int | None = None

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Row":
        """Back from ``dataclasses.asdict``."""
        return cls(**fields | {"problem": Problem.from_json(fields["problem"])})

    @property
    def adapted(self) -> bool:
        """Whether this is a LoRA layer and not the frozen one."""
        return not self.contender.startswith(FROZEN)

    @property
    def limit(self) -> float:
        """The ratio to the frozen layer that arithmetic allows."""
        return self.problem.arithmetic_limit(self.which) if self.adapted else 1.0


def measure(
    problem: Problem,
    passes: Sequence[str],
    against: Sequence[str],
    *,
    device: torch.device,
    clock: Clock,
    seconds: float,
    builders: dict[str, Builder] | None = None,
) -> list[Row]:
    """Rows of the frozen layer, lorafast, and those named in ``against``, for each pass.

    Each pass is sampled for about ``seconds``.
    """
    tensors = draw(problem, device, input_sets(problem))
    found = line_up(problem, tensors, against, builders)
    rows = []
    for which in passes:
        turns = {name: _turn(which, c, tensors) for name, c in found.right.items()}
        samples = interleave(clock, turns, seconds=seconds) if FROZEN in turns else {}
        for name in found.names:
            row = Row(problem, which, name, found.wrong.get(name), found.unavailable.get(name))
            if name in samples:
                row.samples, row.frozen_samples = samples[name], samples[FROZEN]
                row.saved_bytes, row.peak_bytes = _memory(which, found.right[name], tensors, device)
            rows.append(row)
    return rows


def _turn(which: str, contender: Contender, tensors: Tensors) -> Turn:
    """The timed call of a pass on input set i: fresh leaves, no gradients yet."""

    @contextmanager
    def turn(index: int) -> Iterator[Call]:
        x = tensors.x[index % len(tensors.x)].detach().requires_grad_()
        dy = tensors.dy[index % len(tensors.dy)]
        contender.clear_gradients()
        layer = contender.layer
        with contender.context():
            if which == "fwd":
                yield lambda: layer(x)
            elif which == "both":
                yield lambda: layer(x).backward(dy)
            else:
                y = layer(x)
                yield lambda: y.backward(dy)

    return turn


def _memory(
    which: str, contender: Contender, tensors: Tensors, device: torch.device
) -> tuple[int, int]:
    """Bytes saved by a forward, and the peak of a call."""
    x = tensors.x[0].detach().requires_grad_()
    owned: list[Tensor] = [tensors.weight, *contender.parameters.values()]
    with contender.context():
        saved = memory.saved_bytes(lambda: contender.layer(x), owned)
    with _turn(which, contender, tensors)(0) as call:
        peak = memory.peak_bytes(call, device)
    contender.clear_gradients()
    return saved, peak
