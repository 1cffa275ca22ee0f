"""What is counted of one contender, and a table of several."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorafast.bench.common.table import megabytes, table
from lorafast.bench.traffic.count import Traffic, counting
from lorafast.bench.traffic.launches import Launch, standing_in

_HEADER = ("", "launches fwd", "bwd", "MB fwd", "bwd", "both", "of frozen")


@dataclass(kw_only=True)
class Counted:
    """The traffic of one contender's forward and backward, in bytes."""

    contender: str
    forward: Traffic = field(default_factory=Traffic)
    backward: Traffic = field(default_factory=Traffic)

    @property
    def bytes(self) -> int:
        """Forward and backward, read and written."""
        return self.forward.bytes + self.backward.bytes

    def count(self, sms: int, forward: Callable[[], Any], backward: Callable[[], Any]) -> None:
        """Calls both, one after the other; what Triton's kernels launch is that on so many ``sms``."""
        noted: list[Launch] = []
        with standing_in(sms, noted.extend):
            for way, call in (("forward", forward), ("backward", backward)):
                noted.clear()
                with counting() as traffic:
                    call()
                for launch in noted:
                    traffic.add(1, launch.read, launch.written)
                setattr(self, way, traffic)


def format_rows(title: str, rows: Sequence[Counted]) -> str:
    """A line for each contender, the frozen one first."""
    frozen = rows[0].bytes
    lines = [
        (
            f"  {row.contender}",
            str(row.forward.launches),
            str(row.backward.launches),
            megabytes(row.forward.bytes),
            megabytes(row.backward.bytes),
            megabytes(row.bytes),
            f"{row.bytes / frozen:.2f}",
        )
        for row in rows
    ]
    return f"\n{title}\n{table(_HEADER, lines)}"
