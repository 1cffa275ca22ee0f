"""Counts a bottleneck adapter behind a feed-forward: the frozen one alone, ours, plain PyTorch's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lorafast.bench.bottlenecks import network
from lorafast.bench.bottlenecks.job import SIZES, Size
from lorafast.bench.common.contenders import FROZEN
from lorafast.bench.common.problem import DTYPES
from lorafast.bench.common.progress import progress, say
from lorafast.bench.common.record import Record
from lorafast.bench.common.table import markdown, megabytes
from lorafast.bench.traffic import counted
from lorafast.bench.traffic.count import Traffic
from lorafast.bench.traffic.counted import Counted
from lorafast.bench.traffic.launches import H200_SMS
from torch import Tensor

NOTES = """\
MB: what every operation reads and writes, each tensor once, the feed-forward's too; as on an H200 on
which nothing was tuned"""
_ACTIVATION = "gelu"


@dataclass
class Row(Counted):
    """One contender's traffic behind one feed-forward, its own included, in bytes."""

    M: int
    width: int
    hidden: int
    bottleneck: int
    dtype: str

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Row":
        """Back from ``dataclasses.asdict``."""
        counts = {name: Traffic(**fields[name]) for name in ("forward", "backward")}
        return cls(**fields | counts)


def measure(size: Size, bottleneck: int, dtype: str, *, sms: int = H200_SMS) -> list[Row]:
    """Rows of the frozen feed-forward, ours and plain PyTorch's, for a forward and a backward with dx,
    dD, dd, dU and du; as on so many ``sms``."""
    rows = []
    for name in (FROZEN, "lorafast", "torch"):
        row = Row(size.M, size.width, size.hidden, bottleneck, dtype, contender=name)
        with torch.device("meta"):
            feed_forward = network.FeedForward(size.width, size.hidden).to(DTYPES[dtype])
            feed_forward.requires_grad_(False)
            if name == FROZEN:
                made = network.alone(feed_forward)
            else:
                put = network.ours if name == "lorafast" else network.plain
                made = put(feed_forward, bottleneck, _ACTIVATION)
            x = torch.empty((size.M, size.width), dtype=DTYPES[dtype]).requires_grad_()
        _count(row, made.network, x, sms)
        rows.append(row)
    return rows


def _count(row: Row, of: torch.nn.Module, x: Tensor, sms: int) -> None:
    ys: list[Tensor] = []
    row.count(sms, lambda: ys.append(of(x)), lambda: ys[0].backward(torch.empty_like(ys[0])))


def describe(row: Row) -> str:
    """``768 → 64 → 768 behind 768 → 3072 → 768, M=8192, bf16``."""
    adapter = f"{row.width} → {row.bottleneck} → {row.width}"
    behind = f"{row.width} → {row.hidden} → {row.width}"
    return f"{adapter} behind {behind}, M={row.M}, {row.dtype}"


def format_rows(rows: Sequence[Row]) -> str:
    """A line for each contender."""
    return counted.format_rows(describe(rows[0]), rows)


def paragraphs(rows: Sequence[Row]) -> list[str]:
    """What a record says of them: a table, a line for each contender; nothing without rows."""
    frozen = {describe(row): row.bytes for row in rows if row.contender == FROZEN}
    lines = [
        [
            describe(row), row.contender,
            f"{row.forward.launches} + {row.backward.launches}",
            f"{megabytes(row.forward.bytes)} + {megabytes(row.backward.bytes)}",
            f"{row.bytes / frozen[describe(row)]:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    header = ["bottleneck adapter", "", "launches", "MB", "over the frozen"]
    return [markdown(header, lines)] if lines else []


def run(widths: Sequence[int], dtypes: Sequence[str], *, record: Record) -> list[Row]:
    """The rows of all sizes of a GPU, printed and kept in ``record``."""
    rows: list[Row] = []
    cases = [(size, b, dtype) for size in SIZES["cuda"] for b in widths for dtype in dtypes]
    for case in progress(cases, "case"):
        found = measure(*case)
        record.add("traffic_bottlenecks", found)
        rows += found
        say(format_rows(found))
    say("\n" + NOTES)
    return rows
