"""Times bursts of calls on a tiny layer, in microseconds of host time a call."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from lorafast.bench.common.clock import Call, HostClock, Turn, interleave
from lorafast.bench.common.contenders import FROZEN, Contender
from lorafast.bench.common.line_up import line_up
from lorafast.bench.common.problem import Problem, Tensors, draw
from lorafast.bench.common.progress import progress, say
from lorafast.bench.common.record import Record
from lorafast.bench.common.shapes import Shape
from lorafast.bench.common.table import table, why_no_time
from lorafast.bench.layer import Row

PROBLEM = Problem(Shape("tiny", 4, 64, 64, bias=True), 8, "fp32", "fp32", 0.0)
PASSES = {
    "fwd": "forward, adapter trained",
    "no_grad": "forward, no_grad",
    "both": "forward + backward with dx",
}
_CALLS = 200
_HEADER = ("", "µs a call", "middle half", "overhead", "middle half")
_ROUNDS = 60


def measure(
    which: str, against: Sequence[str], *, device: torch.device, rounds: int = _ROUNDS
) -> list[Row]:
    """Rows of the frozen layer, lorafast, and those named, for a pass of ``PASSES``."""
    tensors = draw(PROBLEM, device, 1)
    found = line_up(PROBLEM, tensors, against)
    turns = {name: _turn(which, c, tensors) for name, c in found.right.items()}
    samples = {}
    if FROZEN in turns:
        bursts = interleave(HostClock(), turns, seconds=0.0, least=rounds, most=rounds, warm_up=3)
        samples = {name: [t / _CALLS for t in times] for name, times in bursts.items()}
    rows = []
    for name in found.names:
        row = Row(PROBLEM, which, name, found.wrong.get(name), found.unavailable.get(name))
        if name in samples:
            row.samples, row.frozen_samples = samples[name], samples[FROZEN]
        rows.append(row)
    return rows


def run(
    against: Sequence[str], *, device: torch.device, record: Record, rounds: int = _ROUNDS
) -> list[Row]:
    """The rows of all passes, printed and kept in ``record``."""
    rows: list[Row] = []
    say(f"\ncall overhead: {PROBLEM}")
    for which in progress(PASSES, "pass"):
        found = measure(which, against, device=device, rounds=rounds)
        record.add("call_overhead", found)
        rows += found
        say(f"\n{PASSES[which]}\n{format_rows(found)}")
    return rows


def format_rows(rows: Sequence[Row]) -> str:
    """A line for each contender."""
    remarks = [why_no_time(row.wrong, row.unavailable) for row in rows]
    return table(_HEADER, list(map(_cells, rows)), remarks=remarks)


def _cells(row: Row) -> tuple[str, ...]:
    time, overhead = row.time, row.overhead
    if time is None or overhead is None:
        return (f"  {row.contender}",)
    return (
        f"  {row.contender}",
        f"{time.median * 1e6:.1f}",
        f"{time.low * 1e6:.1f} – {time.high * 1e6:.1f}",
        f"{overhead.median:.2f}",
        f"{overhead.low:.2f} – {overhead.high:.2f}",
    )


def _turn(which: str, contender: Contender, tensors: Tensors) -> Turn:
    """A burst of calls; on a GPU the host waits for the last one."""
    x, dy = tensors.x[0], tensors.dy[0]
    leaf = x.detach().requires_grad_()

    def forward() -> object:
        return contender.layer(x)

    def forward_backward() -> None:
        leaf.grad = None
        contender.clear_gradients()
        contender.layer(leaf).backward(dy)

    call: Callable[[], object] = forward_backward if which == "both" else forward

    @contextmanager
    def turn(index: int) -> Iterator[Call]:
        def burst() -> None:
            for _ in range(_CALLS):
                call()
            if x.is_cuda:
                torch.cuda.synchronize()

        with contender.context(), torch.set_grad_enabled(which != "no_grad"):
            yield burst

    return turn
