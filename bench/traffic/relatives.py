"""Counts LoRA's relatives over one linear layer: the frozen layer, PEFT's of each kind, accelerated.

Layers without memory are what counting takes, and what ``accelerate`` leaves to PEFT: within ``_served``
it doesn't. BOFT's permutations are read before: PEFT makes them of numbers.
"""

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from lorafast.bench.common.contenders import FROZEN
from lorafast.bench.common.problem import DTYPES
from lorafast.bench.common.progress import progress, say
from lorafast.bench.common.record import Record
from lorafast.bench.common.shapes import Shape
from lorafast.bench.common.table import markdown, megabytes
from lorafast.bench.relatives import kinds
from lorafast.bench.relatives.kinds import FAST, KINDS, STOCK
from lorafast.bench.traffic import counted
from lorafast.bench.traffic.count import Traffic
from lorafast.bench.traffic.counted import Counted
from lorafast.bench.traffic.launches import H200_SMS
from torch import Tensor, nn

NOTES = """\
MB: what every operation reads and writes, each tensor once; as on an H200 on which nothing was tuned.
BOFT: PEFT's as it is without its own CUDA extension"""


@dataclass
class Row(Counted):
    """One contender's traffic of one kind, in bytes; of the frozen layer ``kind`` is empty."""

    kind: str
    M: int
    K: int
    N: int
    r: int
    dtype: str

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Row":
        """Back from ``dataclasses.asdict``."""
        counts = {name: Traffic(**fields[name]) for name in ("forward", "backward")}
        return cls(**fields | counts)

    @property
    def name(self) -> str:
        """``LoHa, r=16``."""
        return kinds.named(self.kind, self.r) if self.kind else FROZEN


@contextlib.contextmanager
def _served() -> Iterator[None]:
    """Within it a layer on the meta device is served as one on a GPU is, though a mode counts."""
    from lorafast.integrations.peft import low_rank, rules

    always: list[tuple[ModuleType, str, bool | None]] = [
        (importlib.import_module(f"lorafast.ops.{name}"), "alone", True)
        for name in ("lokr_linear", "oft_linear", "scaled_lora_linear")
    ]
    always += [(low_rank, "why_stock_parts", None), (rules, "why_not_plain", None)]
    with contextlib.ExitStack() as stack:
        for module, name, answer in always:
            stack.enter_context(mock.patch.object(module, name, return_value=answer))
        yield


def _pair(kind: str, linear: nn.Linear, r: int) -> kinds.Pair:
    """Both layers, whose values are nowhere but those of permutations of the accelerated one."""
    made = kinds.pair(kind, linear, r)
    permutations = made.fast._buffers.get("boft_P")
    for layer in (made.stock, made.fast):
        layer.to("meta")
    if permutations is not None:
        made.fast._buffers["boft_P"] = permutations
    return made


def _traffic_of(layer: nn.Module, row: Row, sms: int) -> None:
    x = torch.empty((row.M, row.K), dtype=DTYPES[row.dtype], device="meta").requires_grad_()
    ys: list[Tensor] = []
    row.count(sms, lambda: ys.append(layer(x)), lambda: ys[0].backward(torch.empty_like(ys[0])))


def measure(
    shape: Shape, r: int, dtype: str, names: Sequence[str] = tuple(KINDS), *, sms: int = H200_SMS
) -> list[Row]:
    """Rows of the frozen layer and of the kinds of ``names``, for a forward and a backward with dx; as
    on so many ``sms``.

    Raises:
        UnavailableError: PEFT isn't installed.
        RuntimeError: the accelerated layer is left to PEFT.
    """
    sizes = (shape.M, shape.K, shape.N, r, dtype)

    def linear(device: str) -> nn.Linear:
        made = nn.Linear(shape.K, shape.N, shape.bias, device, DTYPES[dtype])
        return made.requires_grad_(False)

    rows = [Row("", *sizes, contender=FROZEN)]
    _traffic_of(linear("meta"), rows[0], sms)
    with _served():
        for kind in names:
            pair = _pair(kind, linear("cpu" if kind == "BOFT" else "meta"), r)
            if pair.left is not None:
                raise RuntimeError(f"{kind} is left to PEFT: {pair.left}")
            for contender, layer in ((STOCK, pair.stock), (FAST, pair.fast)):
                row = Row(kind, *sizes, contender=contender)
                _traffic_of(layer, row, sms)
                rows.append(row)
    return rows


def format_rows(rows: Sequence[Row]) -> str:
    """The frozen layer, then a line for each contender of each kind."""
    title = describe(rows[0])
    labelled = [row if not row.kind else _labelled(row) for row in rows]
    return counted.format_rows(title, labelled)


def _labelled(row: Row) -> Counted:
    return Counted(
        contender=f"{row.name}, {row.contender}", forward=row.forward, backward=row.backward
    )


def describe(row: Row) -> str:
    """``M=8192, 4096 → 4096, bf16, fp32 adapters``."""
    return f"M={row.M}, {row.K} → {row.N}, {row.dtype}, fp32 adapters"


def paragraphs(rows: Sequence[Row]) -> list[str]:
    """What a record says of them: a table, a line for each contender; nothing without rows."""
    frozen = {(describe(row), row.r): row.bytes for row in rows if not row.kind}
    lines = [
        [
            describe(row), row.name, "" if not row.kind else row.contender,
            f"{row.forward.launches} + {row.backward.launches}",
            f"{megabytes(row.forward.bytes)} + {megabytes(row.backward.bytes)}",
            f"{row.bytes / frozen[describe(row), row.r]:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    header = ["layer", "kind", "", "launches", "MB", "over the frozen"]
    return [markdown(header, lines)] if lines else []


def run(
    shapes: Sequence[tuple[Shape, int]],
    dtypes: Sequence[str],
    *,
    record: Record,
) -> list[Row]:
    """The rows of all layers, each at its rank, printed and kept in ``record``."""
    rows: list[Row] = []
    cases = [(shape, r, dtype) for shape, r in shapes for dtype in dtypes]
    for case in progress(cases, "layer"):
        found = measure(*case)
        record.add("traffic_relatives", found)
        rows += found
        say(format_rows(found))
    say("\n" + NOTES)
    return rows
