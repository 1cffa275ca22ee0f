"""Times LoRA's relatives over one linear layer: the frozen layer, PEFT's of each kind, and accelerated.

All kinds take turns in one run over the same x, forward and backward with dx. PEFT's own layer says what
is right: the accelerated one must be as near to it in float64 as PEFT's is itself.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from lorafast.bench.common import steps
from lorafast.bench.common.clock import Summary
from lorafast.bench.common.contenders import FROZEN, UnavailableError
from lorafast.bench.common.problem import DTYPES
from lorafast.bench.common.progress import progress, say
from lorafast.bench.common.record import Record
from lorafast.bench.common.shapes import Shape
from lorafast.bench.common.steps import Arm
from lorafast.bench.common.table import markdown, megabytes, table, why_no_time
from lorafast.bench.relatives.kinds import FAST, KINDS, STOCK, Pair, named, pair
from torch import Tensor, nn

from lorafast.reference import contract

_SECONDS = 15.0
_HEADER = (
    "", "peft", "over frozen", "middle half", "accelerated", "over frozen", "middle half",
    "peft / accelerated", "peak MB", "accelerated",
)  # fmt: skip


@dataclass
class Row(Arm):
    """A kind's layer by one contender; of the frozen layer, without which nothing is a ratio, ``kind``
    is empty."""

    kind: str
    M: int
    K: int
    N: int
    r: int
    dtype: str

    @property
    def name(self) -> str:
        """``LoHa, r=16``."""
        return named(self.kind, self.r) if self.kind else FROZEN


def _results(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """A layer's output, and the gradients of x and of its adapter by name."""
    x = x.detach().requires_grad_()
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    y: Tensor = layer(x)
    dx, *gradients = torch.autograd.grad(y, [x, *trained.values()], dy)
    return {"y": y.detach(), "dx": dx} | dict(zip(trained, gradients, strict=True))


def _why_wrong(stock: nn.Module, fast: nn.Module, x: Tensor, dy: Tensor) -> str | None:
    exact = _results(copy.deepcopy(stock).double(), x.double(), dy.double())
    bounds = contract.bounds(_results(stock, x, dy), exact, dtype=x.dtype)
    return contract.why_any_broken(_results(fast, x, dy), bounds)


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    trained = [p for p in layer.parameters() if p.requires_grad]

    def step() -> None:
        layer(x.detach().requires_grad_()).backward(dy)
        for p in trained:
            p.grad = None

    return step


def measure(
    shape: Shape,
    r: int,
    dtype: str,
    *,
    device: torch.device,
    seconds: float,
    kinds: Sequence[str] = tuple(KINDS),
) -> list[Row]:
    """The rows of the frozen layer and of all kinds."""
    names = {FROZEN: ("", FROZEN)}
    names |= {f"{k}, {c}": (k, c) for k in kinds for c in (STOCK, FAST)}
    sizes = (shape.M, shape.K, shape.N, r, dtype)
    rows = {name: Row(k, *sizes, contender=c) for name, (k, c) in names.items()}
    torch.manual_seed(0)
    linear = nn.Linear(shape.K, shape.N, bias=shape.bias).requires_grad_(False)
    linear.to(device, DTYPES[dtype])
    x, dy = (torch.randn(shape.M, size).to(device, DTYPES[dtype]) for size in (shape.K, shape.N))
    made: dict[str, Pair] = {}

    def make(name: str) -> nn.Module:
        kind, contender = names[name]
        if not kind:
            return linear
        if kind not in made:
            made[kind] = pair(kind, linear, r)
        if contender == STOCK:
            return made[kind].stock
        if made[kind].left is not None:
            raise UnavailableError(f"left to PEFT: {made[kind].left}")
        return made[kind].fast

    def why_wrong(name: str, layer: nn.Module) -> str | None:
        kind, contender = names[name]
        return _why_wrong(made[kind].stock, layer, x, dy) if contender == FAST else None

    return steps.measure(
        rows,
        make,
        why_wrong,
        lambda name, layer: _step(layer, x, dy),
        device=device,
        seconds=seconds,
    )


def run(
    shapes: Sequence[tuple[Shape, int]],
    dtypes: Sequence[str],
    *,
    device: torch.device,
    record: Record,
    seconds: float | None = None,
    kinds: Sequence[str] = tuple(KINDS),
) -> list[Row]:
    """All kinds over layers, each at its rank, printed and kept in ``record``."""
    found = []
    for dtype, (shape, r) in progress(list(itertools.product(dtypes, shapes)), "layer"):
        rows = measure(shape, r, dtype, device=device, seconds=seconds or _SECONDS, kinds=kinds)
        say(f"\n{describe(rows[0])}")
        say(format_rows(rows))
        record.add("relatives", rows)
        found += rows
    return found


def describe(row: Row) -> str:
    """``M=512, 2048 → 2048, fp32, forward + backward with dx``."""
    return f"M={row.M}, {row.K} → {row.N}, {row.dtype}, forward + backward with dx"


def by_kind(rows: Sequence[Row]) -> dict[str, tuple[Row, Row]]:
    """PEFT's row and the accelerated one of each kind of one layer, by its name with its size."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.kind:
            found.setdefault(row.name, {})[row.contender] = row
    return {name: (of[STOCK], of[FAST]) for name, of in found.items()}


def speedup(stock: Row, fast: Row) -> Summary | None:
    """The ratio of PEFT's time to the accelerated one's, round by round."""
    if not stock.samples or not fast.samples:
        return None
    return Summary.of_ratio(stock.samples, fast.samples)


def format_rows(rows: Sequence[Row]) -> str:
    """The frozen layer, then a line for each kind."""
    frozen = next(row for row in rows if not row.kind)
    lines: list[tuple[str, ...]] = [
        (f"  {FROZEN}", _time(frozen), "", "", "", "", "", "", megabytes(frozen.peak_bytes))
    ]
    remarks = [_remark(frozen)]
    for name, (stock, fast) in by_kind(rows).items():
        ratio = speedup(stock, fast)
        lines.append(
            (
                f"  {name}", _time(stock), *_overhead(stock), _time(fast), *_overhead(fast),
                "" if ratio is None else f"{ratio.median:.3f}",
                megabytes(stock.peak_bytes), megabytes(fast.peak_bytes),
            )
        )  # fmt: skip
        remarks.append(_remark(fast) or _remark(stock))
    return table(_HEADER, lines, remarks=remarks)


def _time(row: Row) -> str:
    return "" if row.time is None else f"{row.time.median * 1e3:.4g} ms"


def _overhead(row: Row) -> tuple[str, str]:
    overhead = row.overhead
    if overhead is None:
        return "", ""
    return f"{overhead.median:.3f}", f"{overhead.low:.3f} – {overhead.high:.3f}"


def _remark(row: Row) -> str | None:
    return why_no_time(row.wrong, row.unavailable)


def paragraphs(rows: Sequence[Row]) -> list[str]:
    """Of a page: a sentence, then a table for each layer, a kind in each line."""
    found = []
    header = ["", "frozen", "peft", "accelerated", "peft / accelerated", "peak MB"]
    for described, group in itertools.groupby(rows, key=describe):
        same = list(group)
        frozen = _time(next(row for row in same if not row.kind))
        lines = [
            [
                name, frozen, _cell(stock), _cell(fast), _spread(speedup(stock, fast)),
                f"{megabytes(stock.peak_bytes)} → {megabytes(fast.peak_bytes)}",
            ]
            for name, (stock, fast) in by_kind(same).items()
        ]  # fmt: skip
        found += [f"{described}:", markdown(header, lines)]
    if not found:
        return []
    return [
        "PEFT's adapters of each kind over one linear layer, stock and after `lorafast.accelerate`, by "
        "the time of the frozen layer; all of a table took turns in one run. *peak MB*: what a step "
        "allocates at most, stock → accelerated.",
        *found,
    ]


def _cell(row: Row) -> str:
    return _remark(row) or _spread(row.overhead) or "not run"


def _spread(summary: Summary | None) -> str:
    if summary is None:
        return ""
    return f"**{summary.median:.3f}** ({summary.low:.3f} – {summary.high:.3f})"
