"""Counts convolutions: the frozen one, adapted by lorafast, and by PEFT."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lorafast.bench.common.contenders import FROZEN
from lorafast.bench.common.problem import DTYPES, SCALING
from lorafast.bench.common.progress import say
from lorafast.bench.common.record import Record
from lorafast.bench.common.table import markdown, megabytes
from lorafast.bench.traffic import counted
from lorafast.bench.traffic.count import Traffic
from lorafast.bench.traffic.counted import Counted
from lorafast.bench.traffic.launches import H200_SMS
from torch import Tensor, nn

from lorafast.nn import LoRAConv2d

NOTES = """\
MB: what every operation reads and writes, each tensor once, a convolution's too; channels last, as on an
H200 on which nothing was tuned: the convolutions are PyTorch's, expand_backward is Triton's"""


@dataclass(frozen=True)
class Shape:
    """A convolution of ``[batch, C, side, side]`` to N channels, with sides of ``side`` / stride."""

    C: int
    N: int
    side: int
    kernel: int = 3
    stride: int = 1
    batch: int = 32

    def __str__(self) -> str:
        stride = f" / {self.stride}" if self.stride > 1 else ""
        image = f"{self.batch} x {self.C} x {self.side}²"
        return f"{self.kernel} x {self.kernel}{stride}, {image} → {self.N}"


SHAPES = (
    Shape(64, 64, 56),
    Shape(64, 128, 56, stride=2),
    Shape(64, 128, 56, kernel=1, stride=2),
    Shape(128, 128, 28),
    Shape(256, 256, 14),
    Shape(512, 512, 7),
    Shape(256, 64, 56, kernel=1),
)
"""Those of ResNet-18 at 224 x 224, and a 1 x 1 one of ResNet-50."""


@dataclass
class Row(Counted):
    """One contender's traffic on one convolution, in bytes."""

    shape: Shape
    r: int
    dtype: str
    adapter_dtype: str

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Row":
        """Back from ``dataclasses.asdict``."""
        counts = {name: Traffic(**fields[name]) for name in ("forward", "backward")}
        return cls(**fields | counts | {"shape": Shape(**fields["shape"])})


def _frozen(conv: nn.Conv2d, r: int, adapter_dtype: torch.dtype) -> nn.Module:
    return conv


def _lorafast(conv: nn.Conv2d, r: int, adapter_dtype: torch.dtype) -> nn.Module:
    return LoRAConv2d.from_conv(conv, r, alpha=SCALING * r, adapter_dtype=adapter_dtype)


def _peft(conv: nn.Conv2d, r: int, adapter_dtype: torch.dtype) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=SCALING * r, target_modules=["0"])
    model = get_peft_model(
        nn.Sequential(conv), config, autocast_adapter_dtype=adapter_dtype is torch.float32
    )
    layer: nn.Module = model.base_model.model[0]
    return layer


_BUILDERS: dict[str, Callable[[nn.Conv2d, int, torch.dtype], nn.Module]] = {
    FROZEN: _frozen,
    "lorafast": _lorafast,
    "peft": _peft,
}


def measure(
    shape: Shape,
    r: int,
    dtype: str,
    adapter_dtype: str,
    contenders: Iterable[str] = _BUILDERS,
    *,
    sms: int = H200_SMS,
) -> list[Row]:
    """Rows of the contenders for a forward and a backward with dx, dA and dB; as on so many ``sms``."""
    rows = [Row(shape, r, dtype, adapter_dtype, contender=name) for name in contenders]
    for row in rows:
        _count(row, sms)
    return rows


def _count(row: Row, sms: int) -> None:
    shape, dtype = row.shape, DTYPES[row.dtype]
    conv = nn.Conv2d(
        shape.C, shape.N, shape.kernel, shape.stride, shape.kernel // 2, bias=False, device="meta",
        dtype=dtype,
    )  # fmt: skip
    conv.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    layer = _BUILDERS[row.contender](conv, row.r, DTYPES[row.adapter_dtype])
    x = torch.empty((shape.batch, shape.side, shape.side, shape.C), dtype=dtype, device="meta")
    x = x.movedim(-1, 1).requires_grad_()
    ys: list[Tensor] = []
    row.count(sms, lambda: ys.append(layer(x)), lambda: ys[0].backward(torch.empty_like(ys[0])))


def format_rows(rows: Sequence[Row]) -> str:
    """A line for each contender."""
    first = rows[0]
    title = f"{first.shape}: r={first.r}, {first.dtype}, {first.adapter_dtype} adapters"
    return counted.format_rows(title, rows)


def paragraphs(rows: Sequence[Row]) -> list[str]:
    """What a record says of convolutions: a table, a line for each contender; nothing without rows."""
    frozen = {(row.shape, row.r, row.dtype): row.bytes for row in rows if row.contender == FROZEN}
    lines = [
        [
            f"{row.shape}, r={row.r}, {row.dtype}, {row.adapter_dtype} adapter",
            row.contender,
            f"{row.forward.launches} + {row.backward.launches}",
            f"{megabytes(row.forward.bytes)} + {megabytes(row.backward.bytes)}",
            f"{row.bytes / frozen[row.shape, row.r, row.dtype]:.2f}",
        ]
        for row in rows
    ]
    header = ["convolution, channels last", "", "launches", "MB", "over the frozen"]
    return [markdown(header, lines)] if lines else []


def run(
    ranks: Sequence[int], dtypes: Sequence[str], adapter_dtype: str, *, record: Record
) -> list[Row]:
    """The rows of all shapes, printed and kept in ``record``."""
    rows: list[Row] = []
    for shape in SHAPES:
        for r in ranks:
            for dtype in dtypes:
                found = measure(shape, r, dtype, adapter_dtype)
                record.add("traffic_convolutions", found)
                rows += found
                say(format_rows(found))
    say("\n" + NOTES)
    return rows
