"""Has ``tests/ptx`` count what the kernels execute, and prints which unit of an SM bounds each."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafast.bench.common.progress import say
from lorafast.bench.common.record import Record
from lorafast.bench.common.table import table

UNITS = ("tensor", "issue", "shared", "memory")
_ROOT = Path(__file__).resolve().parents[2]
LAUNCH_UNITS = ("tensor", "issue", "shared", "L2", "memory")
TRITON, CUDA = "triton", "cuda"
_HEADER = (
    "", "sm", *UNITS, "bound by", "issued / multiply", "conflicts", "in flight",
    "registers",
)  # fmt: skip
NOTES = """\
tensor, issue, shared, memory: thousands of cycles of an SM for one tile of a GEMM, one program of a
skinny kernel, one item of helpers (a row block of x shrunk beside a GEMM), each unit alone at its full
rate; memory is L2 for a GEMM and beside it, device memory else. The tile of a CUDA C++ kernel is a CTA
issued / multiply: instructions of warps for each multiply-add of 16 x 8 x 16 numbers, in the main loop
conflicts: passes over the banks of shared memory in a step beyond the least; in flight: bytes that the
loop asks memory for ahead, on an SM"""
BESIDE_NOTES = """\
of the whole launch, CUDA C++ / Triton: thousands of cycles by unit; tensor, issue, shared and L2 of an
SM that has the most tiles, memory of the device, for operands and results once; moved: bytes in sectors
by what operands and results are"""
_BESIDE_HEADER = (
    "", "sm", *LAUNCH_UNITS, "bound by", "issued / multiply", "moved", "conflicts", "in flight",
    "registers", "launches",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One kernel at one size on one architecture, as ``ptx.counts`` has counted it.

    ``step``, ``tile`` and ``program``: what one step of the main loop executes, a tile beside its
    steps, a program beside its tiles. ``cycles``: of a tile, by unit. ``launch_cycles``: of the
    launch; ``launches``: how many the operation has. ``moved`` and ``least``: the launch's bytes in
    sectors, and those of operands and results; ``from_memory``: of device memory, where they are
    counted, else 0. ``step_cycles``, ``tile_cycles``: by unit, of a step and of a tile beside its
    steps. Of GEMMs of CUDA C++: ``stalls`` that ptxas gives a warp in a step and in the epilogue,
    and, by wgmma, the ``timeline`` of a tile: its ``clocks``, those that ``tensor`` cores are busy,
    those ``added`` by the low-rank term, and ``idle: `` ones by cause.
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
    steps: float
    tiles: int
    in_flight: float
    from_l2: bool
    registers: int
    cycles: dict[str, float]
    bound: str
    exposed: float
    backend: str = TRITON
    launches: int = 1
    from_memory: float = 0.0
    launch_cycles: dict[str, float] = field(default_factory=dict)
    moved: float = 0.0
    least: float = 0.0
    step_cycles: dict[str, float] = field(default_factory=dict)
    tile_cycles: dict[str, float] = field(default_factory=dict)
    timeline: dict[str, float] = field(default_factory=dict)
    stalls: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the kernel, and what it is asked for."""
        return f"{self.operation} {self.variant}".strip()

    @property
    def issued_per_multiply(self) -> float:
        """Instructions that warps issue in a step, for each ``m16n8k16`` of multiply-adds; 0 where there
        are none."""
        issued: float = sum(self.step["issued"].values())
        multiplies: float = self.step["multiplies"] / (16 * 8 * 16)
        return issued / multiplies if multiplies else 0.0

    @property
    def layer(self) -> str:
        """The sizes that it has."""
        if not self.N:
            return f"{self.M} x {self.K}"
        return f"{self.M} x {self.K} -> {self.N} r{self.r}"


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
    tests = _ROOT / "tests"
    paths = (_ROOT, tests, tests / "kernels", tests / "cuda")
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
    counted = json.loads(done.stdout)
    rows = [Row(**row) for row in counted["rows"]]
    record.add("executed", rows)
    pairs = beside(rows)
    say("\n" + format_rows(alone(rows, pairs)) + "\n\n" + NOTES)
    if pairs:
        say("\n" + table(_BESIDE_HEADER, [beside_line(*pair) for pair in pairs]))
        say("\n" + BESIDE_NOTES)
    if tiles := gemms(rows):
        lines = [(f"{r.name} {r.layer}", f"{r.capability}", *gemm_cells(r, p)) for r, p in tiles]
        say("\n" + table(GEMM_HEADER, lines) + "\n\n" + GEMM_NOTES)
    if counted["without"]:
        record.add("executed_without", [{"reason": counted["without"]}])
        say("\n" + counted["without"])
    return rows


GEMM_HEADER = (
    "", "sm", "tensor / issued / stalls a step", "L2 bytes a clock", *(f"{u} beside" for u in UNITS),
    "stalls after", "added", "tensor-bound", "idle most",
)  # fmt: skip
GEMM_NOTES = """\
tiles of CUDA C++ GEMMs. tensor / issued / stalls a step: cycles of tensor cores, cycles in which
four schedulers issue all warps' instructions, and the stalls of one warp by its machine code; L2
bytes a clock: of an SM while tensor cores are busy; beside: cycles of a tile beside its steps by
unit; stalls after: of a warp from its last product to its last store; added: cycles that a low-rank
term adds to the tile of the same GEMM without it, by the unit that takes longest, or by the
timeline where there is one; tensor-bound: the share of a tile's clocks in which tensor cores
multiply, by the timeline, a model of the CTA's warps with assumed latencies; idle most: for what
they wait most of the rest, in clocks"""


def gemms(rows: Sequence[Row]) -> list[tuple[Row, Row | None]]:
    """The tiles of CUDA C++ GEMMs, each with the same GEMM's without a low-rank term."""
    plain = {
        (row.capability, row.M, row.K, row.N, row.variant): row
        for row in rows
        if row.backend == CUDA and row.variant.startswith("plain")
    }
    return [
        (row, plain.get((row.capability, row.M, row.K, row.N, _plain_variant(row))))
        for row in rows
        if row.stalls
    ]


def _plain_variant(row: Row) -> str:
    return "plain dx" if row.variant.split()[:1] == ["dx"] else "plain"


def added(row: Row, plain: Row | None) -> float | None:
    """The share of a tile's cycles that its low-rank term adds; None where nobody knows."""
    if not row.r:
        return None
    if "added" in row.timeline:
        return row.timeline["added"] / (row.timeline["clocks"] - row.timeline["added"])
    if plain is None or plain.tiles != row.tiles:
        return None
    more = max(cycles - plain.tile_cycles[unit] for unit, cycles in row.tile_cycles.items())
    return more / plain.cycles["tensor"]


def gemm_cells(row: Row, plain: Row | None) -> tuple[str, ...]:
    """What a tile of a GEMM is made of."""
    share, line = added(row, plain), row.timeline
    idle = {name: clocks for name, clocks in line.items() if name.startswith("idle: ")}
    most = max(idle, key=idle.__getitem__, default="")
    step = row.step_cycles
    return (
        f"{step['tensor']:.0f} / {step['issue']:.0f} / {row.stalls['step']:.0f}",
        f"{32 * row.step['sectors'] / step['tensor']:.0f}",
        *(f"{row.tile_cycles[unit]:,.0f}" for unit in UNITS),
        f"{row.stalls['epilogue']:,.0f}",
        "–" if share is None else f"{share:.1%}",
        f"{line['tensor'] / line['clocks']:.1%}" if line else "–",
        f"{most.removeprefix('idle: ')} {idle[most]:,.0f}" if most else "–",
    )


Beside = tuple[Row, list[Row]]
"""A CUDA C++ kernel, and the Triton kernels that do the same."""
_COMPOSED = {"lora_linear": ("shrink", "linear_expand forward")}


def beside(rows: Sequence[Row]) -> list[Beside]:
    """Each CUDA C++ kernel with Triton's for the same sizes, none where there are none of them."""
    triton: dict[tuple[object, ...], Row] = {}
    for row in rows:
        if row.backend == TRITON:
            triton.setdefault((row.name, *_sizes(row)), row)
    pairs = []
    for row in rows:
        if row.backend == CUDA:
            alone = row.variant in ("tile", "item")
            names = (row.name,) if alone else _COMPOSED.get(row.operation, (row.name,))
            found = [triton.get((name, *_sizes(row, name.split()[0]))) for name in names]
            pairs.append((row, [one for one in found if one is not None] if all(found) else []))
    return pairs


def alone(rows: Sequence[Row], pairs: Sequence[Beside]) -> list[Row]:
    """Triton's rows that no CUDA C++ kernel stands beside."""
    shown = {id(row) for _, triton in pairs for row in triton}
    return [row for row in rows if row.backend == TRITON and id(row) not in shown]


def _sizes(row: Row, operation: str = "") -> tuple[int, ...]:
    """What matters to an operation: its architecture and the sizes that it has."""
    operation = operation or row.operation
    if operation in ("shrink", "shrink_backward"):
        return row.capability, row.M, row.K, row.r
    if operation in ("expand", "expand_backward"):
        return row.capability, row.M, row.N, row.r
    return row.capability, row.M, row.K, row.N, row.r


def beside_cells(cuda: Row, triton: Sequence[Row]) -> tuple[str, ...]:
    """Both, a cell a unit, and so on; Triton's launches of one layer are added up."""
    together = {unit: sum(row.launch_cycles[unit] for row in triton) for unit in LAUNCH_UNITS}
    most = [max(cycles, key=cycles.__getitem__) for cycles in (cuda.launch_cycles, together)]

    def both(of: Callable[[Row], str], missing: str = "–") -> str:
        return f"{of(cuda)} / {', '.join(map(of, triton)) or missing}"

    def ratio(moved: float, least: float) -> str:
        return f"{moved / least:.2f}"

    moved = ratio(sum(row.moved for row in triton), cuda.least) if triton else "–"
    return (
        *(
            f"{cuda.launch_cycles[unit] / 1000:.1f} / "
            + (f"{together[unit] / 1000:.1f}" if triton else "–")
            for unit in LAUNCH_UNITS
        ),
        f"{most[0]} / {most[1] if triton else '–'}",
        both(lambda row: f"{row.issued_per_multiply:.1f}" if row.step["multiplies"] else "–"),
        f"{ratio(cuda.moved, cuda.least)} / {moved}",
        both(lambda row: f"{max(0.0, row.step['conflicts']):.0f}"),
        both(lambda row: f"{row.in_flight / 1024:.0f}" if row.in_flight else "–"),
        both(lambda row: f"{row.registers}"),
        f"{cuda.launches} / {sum(row.launches for row in triton) or '–'}",
    )


def beside_line(cuda: Row, triton: Sequence[Row]) -> tuple[str, ...]:
    """The cells of a kernel beside Triton's."""
    return f"{cuda.name} {cuda.layer}", f"{cuda.capability}", *beside_cells(cuda, triton)


def format_rows(rows: Sequence[Row]) -> str:
    """A line for each kernel."""
    return table(_HEADER, [line(row) for row in rows])


def line(row: Row) -> tuple[str, ...]:
    """The cells of one."""
    return (
        f"{row.name} {row.layer}",
        f"{row.capability}",
        *(f"{row.cycles[unit] / 1000:.1f}" for unit in UNITS),
        row.bound,
        f"{row.issued_per_multiply:.2f}",
        f"{row.step['conflicts']:.0f}",
        f"{row.in_flight / 1024:.0f} KB",
        f"{row.registers}",
    )
