"""Times every contender of a problem in turn, after checking its results."""

import time
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

_TURN_SECONDS = 0.02
_MOST_CALLS = 200


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

    Each pass is sampled for about ``seconds``; inference has none with dropout.
    """
    tensors = draw(problem, device, input_sets(problem))
    found = line_up(problem, tensors, against, builders)
    rows = []
    for which in passes:
        if which == "infer" and problem.dropout_p:
            continue
        calls = _calls_a_turn(which, found.right.get(FROZEN), tensors)
        turns = {name: _turn(which, c, tensors, calls) for name, c in found.right.items()}
        samples = interleave(clock, turns, seconds=seconds) if FROZEN in turns else {}
        samples = {name: [t / calls for t in times] for name, times in samples.items()}
        for name in found.names:
            row = Row(problem, which, name, found.wrong.get(name), found.unavailable.get(name))
            if name in samples:
                row.samples, row.frozen_samples = samples[name], samples[FROZEN]
                row.saved_bytes, row.peak_bytes = _memory(which, found.right[name], tensors, device)
            rows.append(row)
    return rows


def _calls_a_turn(which: str, frozen: Contender | None, tensors: Tensors) -> int:
    """Inference calls a layer again and again: code and weights are warm, whose turn it ever was."""
    if which != "infer" or frozen is None or tensors.x[0].is_cuda:
        return 1
    with _turn(which, frozen, tensors, 3)(0) as call:
        call()
        start = time.perf_counter()
        call()
        one = (time.perf_counter() - start) / 3
    return min(max(int(_TURN_SECONDS / one), 1), _MOST_CALLS)


def _turn(which: str, contender: Contender, tensors: Tensors, calls: int = 1) -> Turn:
    """The timed call (in inference, ``calls`` of them) of a pass from input set i on: fresh leaves, no
    gradients yet."""

    @contextmanager
    def turn(index: int) -> Iterator[Call]:
        x = tensors.x[index % len(tensors.x)].detach().requires_grad_()
        dy = tensors.dy[index % len(tensors.dy)]
        contender.clear_gradients()
        layer = contender.layer
        if which == "infer":
            inputs = [tensors.x[(index + i) % len(tensors.x)] for i in range(calls)]
            with contender.context(), torch.inference_mode():
                yield lambda: [layer(x) for x in inputs][-1]
            return
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
    owned: list[Tensor] = [*tensors.frozen(), *contender.parameters.values()]
    saved = 0
    if which != "infer":
        with contender.context():
            saved = memory.saved_bytes(lambda: contender.layer(x), owned)
    with _turn(which, contender, tensors)(0) as call:
        peak = memory.peak_bytes(call, device)
    contender.clear_gradients()
    return saved, peak
