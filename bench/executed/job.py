"""Has ``tests/ptx`` count what the kernels execute, and prints which unit of an SM bounds each."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafast.bench.common.progress import say
from lorafast.bench.common.record import Record
from lorafast.bench.common.table import table

UNITS = ("tensor", "issue", "shared", "memory")
_ROOT = Path(__file__).resolve().parents[2]
_HEADER = (
    "", "sm", *UNITS, "bound by", "issued / multiply", "conflicts", "in flight",
    "registers",
)  # fmt: skip
NOTES = """\
tensor, issue, shared, memory: thousands of cycles of an SM for one tile of a GEMM, one program of a
skinny kernel, one item of helpers (a row block of x shrunk beside a GEMM), each unit alone at its full
rate; memory is L2 for a GEMM and beside it, device memory else
issued / multiply: instructions of warps for each multiply-add of 16 x 8 x 16 numbers, in the main loop
conflicts: passes over the banks of shared memory in a step beyond the least; in flight: bytes that the
loop asks memory for ahead, on an SM"""


@dataclass(frozen=True)
class Row:
    """One kernel at one size on one architecture, as ``ptx.counts`` has counted it.

    ``step``, ``tile`` and ``program``: what one step of the main loop executes, a tile beside its steps,
    a program beside its tiles. ``cycles``: of a tile, by unit.
    """

    operation: str
    variant: str
    capability: int
    M: int
    K: int
    N: int
    r: int
    step: dict[str, Any]
    tile: dict[str, Any]
    program: dict[str, Any]
    steps: int
    tiles: int
    in_flight: float
    from_l2: bool
    registers: int
    cycles: dict[str, float]
    bound: str
    exposed: float

    @property
    def name(self) -> str:
        """Of the kernel, and what it is asked for."""
        return f"{self.operation} {self.variant}".strip()

    @property
    def issued_per_multiply(self) -> float:
        """Instructions that warps issue in a step, for each ``m16n8k16`` of multiply-adds."""
        issued: float = sum(self.step["issued"].values())
        return issued / (self.step["multiplies"] / (16 * 8 * 16))


class UnexecutedError(ValueError):
    """Kernels can't be executed here."""


def check() -> None:
    """Raises UnexecutedError outside a checkout, whose ``tests`` execute the kernels."""
    if not (_ROOT / "tests" / "ptx").is_dir():
        raise UnexecutedError(
            "--executed needs a checkout: what executes kernels lies in its tests/ptx"
        )


def run(*, record: Record) -> list[Row]:
    """The rows of every kernel at the sizes that matter, printed and kept in ``record``.

    Raises:
        UnexecutedError: this is no checkout, or the kernels can't be executed.
    """
    check()
    say("executing the kernels' PTX, a few tiles of each")
    paths = (_ROOT, _ROOT / "tests", _ROOT / "tests" / "kernels")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    done = subprocess.run(
        [sys.executable, "-m", "ptx.counts", "--json"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip() and line[0] != " "]
        reason = said[-1] if said else f"exit status {done.returncode}"
        raise UnexecutedError(f"--executed: {reason}")
    rows = [Row(**row) for row in json.loads(done.stdout)]
    record.add("executed", rows)
    say("\n" + format_rows(rows) + "\n\n" + NOTES)
    return rows


def format_rows(rows: Sequence[Row]) -> str:
    """A line for each kernel."""
    return table(_HEADER, [line(row) for row in rows])


def line(row: Row) -> tuple[str, ...]:
    """The cells of one."""
    return (
        f"{row.name} {row.M} x {row.K} -> {row.N} r{row.r}",
        f"{row.capability}",
        *(f"{row.cycles[unit] / 1000:.1f}" for unit in UNITS),
        row.bound,
        f"{row.issued_per_multiply:.2f}",
        f"{row.step['conflicts']:.0f}",
        f"{row.in_flight / 1024:.0f} KB",
        f"{row.registers}",
    )
