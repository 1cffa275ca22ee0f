"""Times a bottleneck adapter at the place where a transformer's block has it, after checking it.

That place is the output of a feed-forward, and what a user pays is said of that: the time of the
feed-forward with an adapter over that of the frozen one alone, forward and backward with the gradient
of x, which the blocks before need. Beside them stands the feed-forward whose own weights are trained.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from lorafast.bench.bottlenecks import network
from lorafast.bench.bottlenecks.network import ACTIVATIONS, FeedForward, Made
from lorafast.bench.common import steps
from lorafast.bench.common.contenders import FROZEN, FULL
from lorafast.bench.common.problem import DTYPES
from lorafast.bench.common.progress import progress
from lorafast.bench.common.record import Record
from lorafast.bench.common.steps import Arm, show
from torch import Tensor, nn

from lorafast.reference import contract

_ADAPTED = {"lorafast": network.ours, "torch": network.plain, "adapters": network.hub}
ARMS = (FROZEN, *_ADAPTED, FULL)
_SECONDS = 4.0


@dataclass(frozen=True)
class Size:
    """A feed-forward ``width → hidden → width`` over M rows."""

    M: int
    width: int
    hidden: int


SIZES = {
    "cpu": (Size(512, 384, 1536), Size(512, 768, 3072)),
    "cuda": (Size(8192, 768, 3072), Size(8192, 4096, 16384)),
}
"""By type of device: those of MiniLM, BERT-base, and a width of 4096."""


@dataclass
class Row(Arm):
    """One arm behind one feed-forward."""

    M: int
    width: int
    hidden: int
    bottleneck: int
    activation: str
    dtype: str


def _make(name: str, frozen: FeedForward, bottleneck: int, activation: str) -> Made:
    """An arm over weights of its own if it trains them, else over those of ``frozen``."""
    if name not in _ADAPTED:
        return network.alone(copy.deepcopy(frozen).requires_grad_(name == FULL))
    over = copy.deepcopy(frozen, {id(p): p for p in frozen.parameters()})
    made = _ADAPTED[name](over, bottleneck, activation)
    network.draw(made.trained)
    return made


def _results(adapter: nn.Module, trained: dict[str, nn.Parameter], h: Tensor) -> dict[str, Tensor]:
    """An adapter's output, and the gradients of h, D, d, U and u."""
    h = h.detach().requires_grad_()
    y: Tensor = adapter(h)
    generator = torch.Generator().manual_seed(3)
    dy = torch.randn(y.shape, generator=generator).to(y)
    dh, *gradients = torch.autograd.grad(y, [h, *trained.values()], dy)
    named = dict(zip((f"d{name}" for name in trained), gradients, strict=True))
    return {"y": y.detach(), "dh": dh} | named


def _bounds(plain: Made, h: Tensor) -> dict[str, contract.Bound]:
    """What the contract asks of an adapter of the same values."""
    exact = copy.deepcopy(plain)
    assert plain.adapter is not None
    assert exact.adapter is not None
    exact.adapter.double()
    return contract.bounds(
        _results(plain.adapter, plain.trained, h),
        _results(exact.adapter, exact.trained, h.double()),
        dtype=h.dtype,
    )


def _step(made: Made, x: Tensor, dy: Tensor) -> Callable[[], None]:
    trained = [p for p in made.network.parameters() if p.requires_grad]

    def step() -> None:
        made.network(x.detach().requires_grad_()).backward(dy)
        for p in trained:
            p.grad = None

    return step


def measure(
    size: Size,
    bottleneck: int,
    activation: str,
    dtype: str,
    *,
    device: torch.device,
    seconds: float,
) -> list[Row]:
    """The rows of all arms."""
    sizes = (*asdict(size).values(), bottleneck, activation, dtype)
    rows = {name: Row(*sizes, contender=name) for name in ARMS}
    torch.manual_seed(0)
    frozen = FeedForward(size.width, size.hidden).to(device, DTYPES[dtype]).requires_grad_(False)
    x, dy = (torch.randn(size.M, size.width).to(device, DTYPES[dtype]) for _ in range(2))
    h = frozen(x)
    bounds = _bounds(_make("torch", frozen, bottleneck, activation), h)

    def why_wrong(name: str, made: Made) -> str | None:
        if made.adapter is None:
            return None
        return contract.why_any_broken(_results(made.adapter, made.trained, h), bounds)

    return steps.measure(
        rows,
        lambda name: _make(name, frozen, bottleneck, activation),
        why_wrong,
        lambda name, made: _step(made, x, dy),
        device=device,
        seconds=seconds,
    )


def run(
    widths: Sequence[int],
    dtypes: Sequence[str],
    *,
    device: torch.device,
    record: Record,
    sizes: Sequence[Size] | None = None,
    seconds: float | None = None,
) -> list[Row]:
    """All arms of bottlenecks of these widths, printed and kept in ``record``."""
    found = []
    cases = [
        (size, width, activation, dtype)
        for dtype in dtypes
        for size in sizes or SIZES[device.type]
        for width in widths
        for activation in ACTIVATIONS
    ]
    for case in progress(cases, "case"):
        rows = measure(*case, device=device, seconds=seconds or _SECONDS)
        show(rows, describe)
        record.add("bottlenecks", rows)
        found += rows
    return found


def describe(row: Row) -> str:
    """``A bottleneck adapter (768 → 64 → 768, gelu) behind a feed-forward …``."""
    return (
        f"A bottleneck adapter ({row.width} → {row.bottleneck} → {row.width}, {row.activation}) behind "
        f"a frozen feed-forward ({row.width} → {row.hidden} → {row.width}), M={row.M}, {row.dtype}, "
        "forward + backward with dx"
    )
