"""What a kernel executes for each K-step, each tile and each program, and which unit bounds it.

    python -m ptx.counts [--json] [sm_90 ...]        (with tests/ and tests/kernels on PYTHONPATH)

The code of a launch at full size is executed on a few tiles and on twice as many, with few K-steps and
with more. The differences are what a K-step costs, what a tile costs beside its K-steps, and what a
program costs beside its tiles: exactly, since instructions are counted. Cycles are a bound from below:
every unit of an SM at its full rate, nothing waiting for anything.

Triton's kernels, and where nvcc is those of csrc/cuda (``cuda_counts``), whose CTAs are the tiles.
"""

import argparse
import functools
import itertools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import torch
from lorafast.kernels.common import plan
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.plan import Helpers
from lorafast.kernels.expand import expand
from lorafast.kernels.expand_backward import expand_backward
from lorafast.kernels.linear_expand import linear_expand
from lorafast.kernels.lora_linear import lora_linear
from lorafast.kernels.shrink import shrink
from lorafast.kernels.shrink_backward import shrink_backward
from lorafast.kernels.tables import find
from machine_code import Known
from recorded import launches_of

from .executed import executed
from .launch import Count

KNOWN_IS_ENOUGH = "none"
SMS = {75: 40, 80: 108, 86: 82, 90: 132}  # of the chips of RATES


@dataclass(frozen=True)
class Rates:
    """What an SM does in a cycle, by NVIDIA's white papers and data sheets of the largest chips."""

    tensor: int
    """Multiply-adds of 16-bit numbers with float32 sums."""
    memory: float
    """Bytes from device memory: bandwidth by clock and SMs."""
    l2: float
    """Bytes from L2."""
    issue: int = 4
    """Instructions of warps."""
    shared: int = 128
    """Bytes of shared memory, of which a wavefront has 128."""


RATES = {
    # T4, whose SM has 16 load/store units, half of what the others have.
    75: Rates(tensor=512, memory=320 / 1.59 / 40, l2=64, shared=64),
    80: Rates(tensor=1024, memory=1555 / 1.41 / 108, l2=64),  # A100, 40 GB
    86: Rates(tensor=256, memory=936 / 1.70 / 82, l2=64),  # RTX 3090: half with float32 sums
    90: Rates(tensor=2048, memory=3350 / 1.83 / 132, l2=64),  # H100 SXM
}

_CLASSES = (
    ("tensor", r"mma\.|wgmma\.mma_async|tcgen05\.mma|wmma\.mma"),
    ("shared", r"ldmatrix|stmatrix|(ld|st|atom|red)(\.\w+)*\.shared|wmma\.(load|store)"),
    ("copy", r"cp\."),
    ("global", r"(ld|st|atom|red)\.(?!param\b|const\b)"),
    ("wait", r"bar|mbarrier|fence|membar|wgmma|tcgen05|griddepcontrol|elect|shfl|vote"),
    ("branch", r"bra\b|brx|call|ret|exit|setp"),
    ("float", r"\w+(\.\w+)*\.(f64|f32|f16|bf16|f16x2|bf16x2|f32x2)\b"),
    ("integer", r""),
)
CLASSES = tuple(name for name, _ in _CLASSES)


@functools.cache
def class_of(opcode: str) -> str:
    """The class of an instruction."""
    return next(name for name, pattern in _CLASSES if re.match(pattern, opcode))


@dataclass(frozen=True)
class Amounts:
    """Of a part of a program: a K-step, a tile, or what surrounds them."""

    issued: dict[str, float]
    multiplies: float
    sectors: float
    wavefronts: float
    """Of the banks of shared memory, those of ``wgmma``'s operands included."""
    conflicts: float
    """Wavefronts beyond the least that the bytes need."""

    def minus(self, other: "Amounts", times: float = 1.0) -> "Amounts":
        """``self - times * other``."""
        numbers = {
            name: getattr(self, name) - times * getattr(other, name)
            for name in ("multiplies", "sectors", "wavefronts", "conflicts")
        }
        issued = {n: v - times * other.issued[n] for n, v in self.issued.items()}
        return Amounts(issued=issued, **numbers)

    def over(self, count: float) -> "Amounts":
        """``self / count``."""
        nothing = Amounts(dict.fromkeys(self.issued, 0.0), 0.0, 0.0, 0.0, 0.0)
        return nothing.minus(self, -1.0 / count)

    def cycles(self, rates: Rates, from_l2: bool) -> dict[str, float]:
        """The least time of each unit of an SM that does this alone."""
        return {
            "tensor": self.multiplies / rates.tensor,
            "issue": sum(self.issued.values()) / rates.issue,
            "shared": 128 * self.wavefronts / rates.shared,
            "memory": 32 * self.sectors / (rates.l2 if from_l2 else rates.memory),
        }


def amounts(counts: tuple[Count, ...]) -> Amounts:
    """Of a whole launch."""
    issued = Counter[str](dict.fromkeys(CLASSES, 0))
    wavefronts = conflicts = 0.0
    for c in counts:
        issued[class_of(c.opcode)] += c.issued
        wavefronts += c.wavefronts + _operands(c)
        if c.opcode.startswith(("ld.shared", "st.shared", "ldmatrix", "stmatrix")):
            conflicts += c.wavefronts - c.bytes / 128
    return Amounts(
        {name: float(n) for name, n in issued.items()},
        float(sum(c.multiplies for c in counts)),
        float(sum(c.sectors for c in counts)),
        wavefronts,
        conflicts,
    )


def _operands(c: Count) -> float:
    """Wavefronts in which ``wgmma`` reads shared memory: A, and B once for the four warps."""
    shape = re.match(r"wgmma\.mma_async.*\.m64n(\d+)k(\d+)\.\w+\.(\w+)", c.opcode)
    if shape is None:
        return 0.0
    n, k = int(shape[1]), int(shape[2])
    item = {"tf32": 4, "bf16": 2, "f16": 2}.get(shape[3], 1)
    return c.issued * (n / 4 + 16) * k * item / 128


@dataclass(frozen=True)
class Row:
    """One kernel at one size on one architecture."""

    operation: str
    variant: str
    capability: int
    M: int
    K: int
    N: int
    r: int
    step: Amounts
    """Of one step of the main loop."""
    tile: Amounts
    """Of a tile beside its steps: the low-rank term, the epilogue. A skinny kernel's program has one."""
    program: Amounts
    """Of a program beside its tiles."""
    steps: float
    """Steps of a tile at this size; of a program, where several share them; of a CTA on average."""
    tiles: int
    """Tiles of the launch, and shares of them."""
    in_flight: float
    """Bytes that the loop has asked memory for ahead of their use, on an SM."""
    from_l2: bool
    registers: int
    """Of a thread, by ptxas."""
    backend: str = "triton"
    launches: int = 1
    """Of the operation; the first is counted."""
    from_memory: float = 0.0
    """Bytes that come from device memory or go there, where they are counted; 0: see ``least``."""
    timeline: dict[str, float] = field(default_factory=dict)
    """Clocks of a tile by a model of its CTA's warps (tests/cuda/timeline.py), where there is one."""
    stalls: dict[str, float] = field(default_factory=dict)
    """Clocks for which ptxas holds a warp of a GEMM back in a step, and in its epilogue, by its
    machine code."""

    @property
    def launch(self) -> Amounts:
        """Of the whole launch, but what programs do beside their tiles."""
        one = self.tile.minus(self.step, -self.steps)
        return one.over(1 / self.tiles)

    @property
    def launch_cycles(self) -> dict[str, float]:
        """The least time of the launch by unit. Of an SM that has the most tiles: tensor, issue, shared
        and L2, by which all sectors come; of the device: memory, for operands and results once where
        it isn't known better."""
        rates, sms = RATES[self.capability], SMS[self.capability]
        rounds = -(-self.tiles // sms)
        found = {unit: rounds * self.cycles[unit] for unit in ("tensor", "issue", "shared")}
        found["L2"] = rounds * self.moved / self.tiles / rates.l2
        found["memory"] = (self.from_memory or self.least) / (rates.memory * sms)
        return found

    @property
    def moved(self) -> float:
        """Bytes that the launch reads and writes of global memory, in sectors."""
        return 32 * self.launch.sectors

    @property
    def least(self) -> float:
        """Bytes of its operands and results, each once."""
        return least(self.operation, self.M, self.K, self.N, self.r)

    @property
    def cycles(self) -> dict[str, float]:
        """Of a whole tile, by unit."""
        rates = RATES[self.capability]
        of_step, of_tile = (a.cycles(rates, self.from_l2) for a in (self.step, self.tile))
        return {unit: of_tile[unit] + self.steps * of_step[unit] for unit in of_step}

    @property
    def step_cycles(self) -> dict[str, float]:
        """Of a step, by unit."""
        return self.step.cycles(RATES[self.capability], self.from_l2)

    @property
    def tile_cycles(self) -> dict[str, float]:
        """Of a tile beside its steps, by unit: what is bare if it hides behind nothing."""
        return self.tile.cycles(RATES[self.capability], self.from_l2)

    @property
    def bound(self) -> str:
        """The unit that takes longest."""
        return max(self.cycles, key=self.cycles.__getitem__)

    @property
    def exposed(self) -> float:
        """Cycles of a tile in which its tensor cores have nothing, if what a tile does beside its steps
        hides behind nothing."""
        rates = RATES[self.capability]
        of_tile = self.tile.cycles(rates, self.from_l2)
        return max(of_tile.values()) - of_tile["tensor"]


def least(operation: str, M: int, K: int, N: int, r: int) -> float:
    """Bytes of the operands and results of an operation in 16 bits, each once."""
    if operation == "mask":
        return M * K / 8
    columns = {"shrink": K, "shrink_backward": K, "expand": N, "expand_backward": N}.get(operation)
    if columns is not None:
        twice = 2 if operation == "expand_backward" else 1
        return 2.0 * (M * columns + twice * r * (M + columns))
    return 2.0 * (M * K + N * K + M * N + r * (N + (K if operation == "lora_linear" else M)))


def what_matters(operation: str, M: int, K: int, N: int, r: int) -> tuple[int, ...]:
    """The sizes that an operation has; of a layer's, N is none of ``shrink``'s."""
    if operation in ("shrink", "shrink_backward"):
        return M, K, r
    return (M, N, r) if operation in ("expand", "expand_backward") else (M, K, N, r)


def _on_cpu(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(sizes, dtype=dtype)


@dataclass(frozen=True)
class Subject:
    """A launcher's call, its steps and tiles as dimensions of the problem."""

    operation: str
    variant: str
    call: Callable[[Callable[..., torch.Tensor], int, int, int, int, LaunchConfig], object]
    along: str
    """The dimension that the main loop goes along."""
    across: str
    """The dimension whose blocks are the tiles that one program goes through."""


def _subjects() -> list[Subject]:
    seed = torch.zeros(1, dtype=torch.int64)

    def forward(empty: Any, M: int, K: int, N: int, r: int, c: LaunchConfig) -> object:
        return linear_expand(empty(M, K), empty(N, K), empty(M, r), empty(N, r), 2.0, config=c)

    def dx(p: float) -> Any:
        def call(empty: Any, M: int, K: int, N: int, r: int, c: LaunchConfig) -> object:
            return linear_expand(
                empty(M, K), empty(K, N), empty(M, r), empty(r, N).t(), 1.0, None,
                p, seed if p else None, transposed=True, config=c,
            )  # fmt: skip

        return call

    def shrunk(p: float) -> Any:
        def call(empty: Any, M: int, K: int, N: int, r: int, c: LaunchConfig) -> object:
            return shrink(empty(M, K), empty(r, K), p, seed if p else None, config=c)

        return call

    def expanded(p: float) -> Any:
        def call(empty: Any, M: int, K: int, N: int, r: int, c: LaunchConfig) -> object:
            mask = p, seed if p else None
            return expand(empty(M, r), empty(N, r), 2.0, *mask, dtype=torch.bfloat16, config=c)

        return call

    def backward(empty: Any, M: int, K: int, N: int, r: int, c: LaunchConfig) -> object:
        return expand_backward(empty(M, N), empty(M, r), empty(N, r), 2.0, config=c)

    def of_a(p: float) -> Any:
        def call(empty: Any, M: int, K: int, N: int, r: int, c: LaunchConfig) -> object:
            mask = p, seed if p else None
            return shrink_backward(empty(M, r), empty(M, K), *mask, torch.bfloat16, config=c)

        return call

    return [
        Subject("linear_expand", "forward", forward, "K", "M"),
        Subject("linear_expand", "dx", dx(0.0), "K", "M"),
        Subject("linear_expand", "dx dropout", dx(0.05), "K", "M"),
        Subject("shrink", "", shrunk(0.0), "K", "M"),
        Subject("shrink", "dropout", shrunk(0.05), "K", "M"),
        Subject("expand", "", expanded(0.0), "M", "N"),
        Subject("expand", "dropout", expanded(0.05), "M", "N"),
        Subject("expand_backward", "", backward, "M", "N"),
        Subject("shrink_backward", "", of_a(0.0), "M", "K"),
        Subject("shrink_backward", "dropout", of_a(0.05), "M", "K"),
    ]


_BLOCK = {"M": "block_m", "N": "block_n", "K": "block_k"}
_FEW, _MORE = 12, 20
"""Steps of the two runs whose difference is counted: more than a pipeline has stages."""


def count(subject: Subject, capability: int, M: int, K: int, N: int, r: int) -> Row:
    """Executes the code that a launch of this size has, on a few tiles of it."""
    tma = capability >= 90
    config = find(subject.operation, capability, torch.bfloat16, M, K, N, r, tma)

    def on_meta(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=torch.bfloat16, device="meta")

    full, *others = launches_of(
        capability, lambda: subject.call(on_meta, M, K, N, r, config), SMS[capability]
    )
    if subject.operation == "expand":
        return _count_expand(subject, capability, (M, K, N, r), config, full)

    def small(tiles: int, steps: int) -> Callable[[Callable[..., torch.Tensor]], object]:
        sizes = {"M": config.block_m, "N": config.block_n, "K": config.block_k}
        sizes[subject.across] = tiles * getattr(config, _BLOCK[subject.across])
        sizes[subject.along] = steps * getattr(config, _BLOCK[subject.along])
        return lambda empty: subject.call(empty, sizes["M"], sizes["K"], sizes["N"], r, config)

    def same_code(sms: int, tiles: int, steps: int) -> bool:
        launch, *_ = launches_of(capability, lambda: small(tiles, steps)(on_meta), sms)
        return launch.code == full.code

    def run(tiles: int, steps: int) -> Amounts:
        with executed(capability, seed=2, sms=sms) as state:
            small(tiles, steps)(_on_cpu)
        return amounts(state.ran[0][2].counts)

    # So few tiles, on so many SMs, that the launch is cut as the full one is: the code is the same.
    ways = ((few, sms) for few in (1, 2, 4) for sms in (1, 2, 4, 8, 16))
    try:
        few, sms = next(
            (few, sms) for few, sms in ways
            if all(same_code(sms, *of) for of in ((few, _FEW), (few, _MORE), (2 * few, _FEW)))
        )  # fmt: skip
    except StopIteration:
        raise RuntimeError(f"no few tiles of {subject.operation} run the code of all") from None
    first, longer, more = run(few, _FEW), run(few, _MORE), run(2 * few, _FEW)
    step = longer.minus(first).over(few * (_MORE - _FEW))
    whole = more.minus(first).over(few)
    # A skinny kernel has a program for each tile, or several, among which they share out its steps.
    small_launch, *_ = launches_of(capability, lambda: small(few, _FEW)(on_meta), sms)
    persistent = subject.operation == "linear_expand"
    shares = 1 if persistent else math.prod(small_launch.grid) // few
    tile = whole.minus(step, _FEW).over(shares)
    sizes = {"M": M, "K": K, "N": N}
    blocks = {name: -(-n // getattr(config, _BLOCK[name])) for name, n in sizes.items()}
    from_l2 = persistent and blocks["M"] > 1  # else W is read once
    tiles = blocks["M"] * blocks["N"] if persistent else blocks[subject.across]
    shares = 1 if persistent else math.prod(full.grid) // tiles
    return Row(
        subject.operation, subject.variant, capability, M, K, N, r, step, tile,
        first.minus(whole, few), -(-blocks[subject.along] // shares), tiles * shares,
        32 * step.sectors * (config.num_stages - 1) * config.ctas_per_sm, from_l2,
        Known(capability, KNOWN_IS_ENOUGH).machine(subject.operation, full)[0].registers,
        launches=1 + len(others),
    )  # fmt: skip


def _count_expand(
    subject: Subject, capability: int, sizes: tuple[int, ...], config: LaunchConfig, full: Any
) -> Row:
    """A program has a column block and goes through row blocks: nothing is shared, and one is a tile."""
    M, K, N, r = sizes
    programs = config.ctas_per_sm

    def run(steps: int) -> Amounts:
        rows = steps * programs * config.block_m
        with executed(capability, seed=2, sms=1) as state:
            subject.call(_on_cpu, rows, K, config.block_n, r, config)
        ((launch, _, ran),) = state.ran
        if launch.code != full.code or math.prod(launch.grid) != programs:
            raise RuntimeError("few tiles of expand run other code than all")
        return amounts(ran.counts).over(programs)

    first, longer = run(_FEW), run(_MORE)
    step = longer.minus(first).over(_MORE - _FEW)
    tile = first.minus(step, _FEW)
    across, down = full.grid[:2]
    return Row(
        "expand", subject.variant, capability, M, K, N, r, step, tile, tile.over(math.inf),
        -(-M // config.block_m) / down, across * down, 0.0, False,
        Known(capability, KNOWN_IS_ENOUGH).machine("expand", full)[0].registers,
    )  # fmt: skip


def count_helped(capability: int, M: int, K: int, N: int, r: int) -> list[Row]:
    """A tile of a layer's forward with helpers and an item of theirs, a row block of x shrunk; none
    where the forward has no helpers.

    One program after the other is executed: nobody waits for a flag, and counts are the same each time.
    More columns of tiles are more tiles and no more items.

    """
    config = find("linear_expand", capability, torch.bfloat16, M, K, N, r, capability >= 90)
    thin = find("shrink", capability, torch.bfloat16, M, K, K, r)

    def call(empty: Callable[..., torch.Tensor], M: int, K: int, N: int) -> object:
        return lora_linear(empty(M, K), empty(N, K), empty(r, K), empty(N, r), 2.0, config=config)

    def on_meta(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=torch.bfloat16, device="meta")

    full, *others = launches_of(capability, lambda: call(on_meta, M, K, N), SMS[capability])
    if others:
        return []

    def run(rows: int, cols: int, steps: int) -> Amounts:
        sizes = rows * config.block_m, steps * config.block_k, cols * config.block_n
        few = Helpers(config.helpers, 0, config.helpers + 1)
        planned = mock.patch.object(plan, "_plan", return_value=few)
        with planned, executed(capability, seed=2, resident=1) as state:
            call(_on_cpu, *sizes)
        if state.ran[0][0].code != full.code:
            raise RuntimeError("few tiles of lora_linear run other code than all")
        return amounts(state.ran[0][2].counts)

    more = _MORE - _FEW
    narrow, long, tall = run(1, 1, _FEW), run(1, 1, _MORE), run(2, 1, _FEW)
    wide, wide_long = run(1, 2, _FEW), run(1, 2, _MORE)
    tile_step = wide_long.minus(wide).minus(long.minus(narrow)).over(more)
    tile = wide.minus(narrow)
    item = tall.minus(narrow).minus(tile)
    # A helper's step is of its own length.
    per_step = thin.block_k / config.block_k
    item_step = long.minus(narrow).minus(tile_step, more).over(more / per_step)
    program = narrow.minus(tile).minus(item).over(config.helpers + 1)
    row_blocks, col_blocks = -(-M // config.block_m), -(-N // config.block_n)
    registers = Known(capability, KNOWN_IS_ENOUGH).machine("lora_linear", full)[0].registers

    def row(variant: str, step: Amounts, whole: Amounts, block: int, tiles: int, ahead: int) -> Row:
        return Row(
            "lora_linear", variant, capability, M, K, N, r, step,
            whole.minus(step, _FEW * config.block_k / block), program, -(-K // block), tiles,
            32 * step.sectors * ahead, True, registers,
        )  # fmt: skip

    return [
        row(
            "tile", tile_step, tile, config.block_k, row_blocks * col_blocks, config.num_stages - 1
        ),
        row("item", item_step, item, thin.block_k, row_blocks, thin.num_stages - 1),
    ]


LAYERS = ((8192, 4096, 4096), (8192, 4096, 1024), (512, 4096, 4096))
"""M, K and N."""
DECODED = ((1, 4096, 4096), (16, 4096, 4096))
DECODED_SMALL = ((1, 1024, 1024), (16, 1024, 1024))
"""Of csrc/cuda alone: sizes at which each CTA may make its own s, or helpers for all."""
SMALL = (512, 576, 576)
"""A linear layer of the small Llama of ``lorafast bench --accelerate``."""
_IN_ONE = (*DECODED, SMALL)
"""Sizes whose forward is one launch of csrc/cuda. A tile of Triton's is counted as if x had its rows."""
RANKS = (16, 64)
TRITONS = (80, 86, 90)
"""Architectures that Triton has code for."""


def rows(capabilities: tuple[int, ...] = TRITONS) -> list[Row]:
    """Of every Triton kernel at the sizes that matter to it, each once."""
    found = []
    for capability in capabilities:
        known = set()
        for (M, K, N), r in itertools.product((*LAYERS, *_IN_ONE), RANKS):
            for subject in _subjects():
                name = subject.operation, subject.variant
                if (M, K, N) in _IN_ONE and name not in _FORWARD:
                    continue
                if (M, K, N) in LAYERS[1:] and r != RANKS[0] and name[0] == "linear_expand":
                    continue  # its tiles are those of the first layer
                key = name, what_matters(subject.operation, M, K, N, r)
                if key not in known:
                    known.add(key)
                    found.append(count(subject, capability, M, K, N, r))
            if (M, K, N) in (LAYERS if r == RANKS[0] else LAYERS[:1]):
                found += count_helped(capability, M, K, N, r)
    return found


_FORWARD = (("shrink", ""), ("linear_expand", "forward"))


def both(capabilities: tuple[int, ...] = (75, *TRITONS)) -> tuple[list[Row], str | None]:
    """Those rows and the ones of csrc/cuda, or a sentence that says why there are none."""
    from . import cuda_counts

    found = rows(tuple(c for c in capabilities if c in TRITONS))
    why_not = cuda_counts.why_no_cuda()
    if why_not is None:
        for capability in capabilities:
            found += cuda_counts.rows(capability)
        return found, None
    return found, f"the CUDA C++ kernels are not counted here: {why_not}"


def as_json(row: Row) -> dict[str, Any]:
    """A row, and what follows from it."""
    names = (
        "cycles", "bound", "exposed", "launch_cycles", "moved", "least", "step_cycles", "tile_cycles"
    )  # fmt: skip
    return asdict(row) | {name: getattr(row, name) for name in names}


def main(words: list[str] | None = None) -> int:
    """Prints a line a kernel, or all of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capabilities", nargs="*", metavar="sm_90")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(words)
    known = [f"sm_{capability}" for capability in RATES]
    for word in given.capabilities:
        if word not in known:
            parser.error(f"there are rates of {', '.join(known)}, not of {word}")
    capabilities = tuple(int(word.removeprefix("sm_")) for word in given.capabilities)
    found, without = both(capabilities or tuple(RATES))
    if given.json:
        json.dump({"rows": [as_json(row) for row in found], "without": without}, sys.stdout)
        return 0
    if without:
        print(without)
    for row in found:
        cycles = " ".join(f"{unit} {n:,.0f}" for unit, n in row.cycles.items())
        name = f"{row.backend} {row.operation} {row.variant}".strip()
        print(
            f"sm_{row.capability} {name:<22} {row.M}x{row.K}x{row.N} r{row.r}: {cycles}; "
            f"exposed {row.exposed:,.0f}, conflicts a step {row.step.conflicts:.0f}, "
            f"in flight {row.in_flight:,.0f}"
        )
        for part in ("step", "tile", "program"):
            of = getattr(row, part)
            listed = {name: n for name, n in of.issued.items() if n}
            listed |= {name: getattr(of, name) for name in ("multiplies", "sectors", "wavefronts")}
            print("    ", part, " ".join(f"{name}:{n:.0f}" for name, n in listed.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
