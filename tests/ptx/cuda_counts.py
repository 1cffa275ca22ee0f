"""What the kernels of csrc/cuda execute at full size, counted on a part: ``counts``, but for CUDA C++.

The family plans the full size for a device of the architecture, and the real launcher is called: grid,
kernel and all numbers of the call (tile, stages, how work is shared out) are the full launch's. It isn't
executed. Executed is the same kernel with the same numbers on few rows or columns, one CTA after the
other, so that nobody waits for a flag. How the counts F of a part scale:

- ``shrink``: row blocks share nothing. One of them, with all of its columns, times their number.
- ``shrink_backward``: the same of column blocks.
- ``expand_backward`` of S row groups and G column blocks: groups share the sums of dB, blocks those of
  ds. F(S, G) = S·F(1, G) + G·(D(S) − S·D(1)), where D(S) is F(S, 1) with one tile a CTA. F(1, G) is a
  line of G, in steps of the four parts that are added at a time.
- ``expand`` and ``mask``: CTAs share nothing.
- ``linear_expand``: tiles share nothing. One of them, with all shares of its K, times their number.
- ``lora_linear`` of tiles: the first of a row's CTAs stores s. Rows times (F(1, 1) + those beyond the
  first times (F(1, 2) − F(1, 1))).
- ``lora_linear`` of few rows (decode): helpers make s, as much of it whatever N is; every other CTA has
  the same block of W. F(n) of n blocks is F(n₁) + (n − n₁)·(F(n₂) − F(n₁)) / (n₂ − n₁).

A step of the main loop is the difference of two loops that are longer than the ring, and a long loop is
a short one and steps. What lanes of a warp do apart is issued a few times more or less, as they happen
to meet. No size here leaves a part of
a tile over; one that does is refused.
"""

import functools
import hashlib
import importlib
import math
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from launchers import FAKE_STREAM, Launch, launchers, why_not
from on_machine import launched
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorafast.backends.cost import Device
from lorafast.backends.cuda.launch import Launch as Planned
from lorafast.core.problem import Problem

from . import nvcc
from .counts import (
    CLASSES,
    DECODED,
    DECODED_SMALL,
    LAYERS,
    RANKS,
    SMALL,
    SMS,
    Amounts,
    Row,
    amounts,
    what_matters,
)
from .launch import Ran

BF16 = torch.bfloat16
WIDE = (8192, 4096, 14336)
"""A layer of a block's MLP."""
_DROPOUT = 0.05
_THREADS_OF_AN_SM = {80: 2048, 86: 1536, 90: 2048}
_SHARED_OF_AN_SM = {80: 164 << 10, 86: 100 << 10, 90: 228 << 10}
_REGISTERS_OF_AN_SM = 1 << 16
_CTA_TAKES = 1 << 10
"""Bytes of shared memory that the system takes for each CTA."""

SHAPES: dict[str, Callable[[dict[str, int]], tuple[int, ...]]] = {
    "x": lambda n: (n["M"], n["K"]),
    "weight": lambda n: (n["N"], n["K"]),
    "lora_A": lambda n: (n["r"], n["K"]),
    "lora_B": lambda n: (n["N"], n["r"]),
    "dy": lambda n: (n["M"], n["N"]),
    "s": lambda n: (n["M"], n["r"]),
    "ds": lambda n: (n["M"], n["r"]),
    "y": lambda n: (n["M"], n["N"]),
    "dA": lambda n: (n["r"], n["K"]),
    "dB": lambda n: (n["N"], n["r"]),
    "bits": lambda n: (n["M"], -(-n["K"] // 8)),
}
"""Of an operation's tensors, by the names in its schema."""
_SCRATCH = ("partials", "scratch", "counters")


def why_no_cuda() -> str | None:
    """A sentence if the CUDA C++ kernels can't be counted here, else None."""
    return why_not()


class Sum(Counter[str]):
    """Amounts of a part of a launch by name, to calculate with."""

    @classmethod
    def of(cls, ran: Ran) -> "Sum":
        found = amounts(ran.counts)
        one = cls(found.issued)
        for name in ("multiplies", "sectors", "wavefronts", "conflicts"):
            one["its " + name] = getattr(found, name)
        for count in ran.counts:
            if count.opcode.startswith("cp."):
                one["copied"] += count.sectors
            elif "no_allocate" in count.opcode:
                one[f"streamed in line {count.line}"] = count.sectors
            elif count.multiplies:
                one[f"multiplied in line {count.line}"] = count.multiplies
        return one

    def __sub__(self, other: Any) -> "Sum":
        return self.plus(other, -1)

    def plus(self, other: "Sum", times: float = 1.0) -> "Sum":
        """``self + times * other``."""
        return Sum({name: self[name] + times * other[name] for name in {**self, **other}})

    def times(self, factor: float) -> "Sum":
        """``factor * self``."""
        return Sum({name: factor * value for name, value in self.items()})

    @property
    def amounts(self) -> Amounts:
        """As ``counts`` has them."""
        names = ("multiplies", "sectors", "wavefronts", "conflicts")
        of = {name: float(self["its " + name]) for name in names}
        return Amounts({name: float(self[name]) for name in CLASSES}, **of)


@dataclass(frozen=True)
class Subject:
    """A call of a family: ``sizes`` are M, K, N and r of the layer."""

    operation: str
    family: str
    sizes: tuple[int, int, int, int]
    dropout: bool = False
    variant: str = ""

    @property
    def name(self) -> str:
        """Of the operation, and what it is asked for."""
        return " ".join(filter(None, (self.operation, self.variant, "dropout" * self.dropout)))

    def problem(self) -> Problem:
        """As the family is asked."""
        M, K, N, r = self.sizes
        if self.transposed:
            K, N = N, K
        wants = {"expand_backward": ("ds", "dB"), "lora_linear": ("y", "s")}
        if self.family == "decode":
            wants["lora_linear"] = ("y",)
        return Problem(
            self.operation, M,
            0 if self.operation in ("expand", "expand_backward") else K,
            0 if self.operation in ("shrink", "shrink_backward") else N,
            r, BF16, BF16, torch.device("cpu"), transposed=self.transposed,
            wants=wants.get(self.operation, ()), dropout=self.dropout,
        )  # fmt: skip

    @property
    def transposed(self) -> bool:
        """Whether the weight is read by its columns, as in dx; ``sizes`` are the GEMM's."""
        return self.variant == "dx"

    def arguments(self) -> tuple[Any, ...]:
        """Of the plan's ``run``: tensors whose elements nobody reads."""
        M, K, N, r = self.sizes
        n = {"M": M, "K": K, "N": N, "r": r}
        names = {
            "shrink": "x lora_A", "shrink_backward": "ds x", "expand_backward": "dy s lora_B",
            "expand": "s lora_B", "lora_linear": "x weight lora_A lora_B",
            "linear_expand": "x weight s lora_B",
        }[self.operation].split()  # fmt: skip
        given: list[Any] = [torch.empty(SHAPES[name](n), dtype=BF16) for name in names]
        if self.transposed:
            given[1], given[3] = given[1].t().contiguous(), given[3].t().contiguous().t()
        if self.operation not in ("shrink", "shrink_backward"):
            given.append(2.0)
        if self.operation in ("lora_linear", "linear_expand"):
            given.append(None)
        if self.operation != "expand_backward":
            given += _mask(self.dropout)
        return tuple(given)


def _mask(dropout: bool) -> tuple[float, Tensor | None]:
    return (_DROPOUT, torch.zeros(1, dtype=torch.int64)) if dropout else (0.0, None)


class _Calls(TorchDispatchMode):
    """Keeps the calls of csrc/cuda's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lorafast_cuda":
            self.found.append((func, args))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, eq=False)
class Whole:
    """A launch at full size: how it is called, and what the launcher asks the runtime for."""

    subject: Subject
    capability: int
    func: Any
    given: tuple[Any, ...]
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int

    @property
    def n(self) -> dict[str, int]:
        """The sizes, and the numbers of the call."""
        numbers = {a.name: v for a, v in self.arguments() if type(v) is int}
        return numbers | dict(zip("MKNr", self.subject.sizes, strict=True))

    @property
    def ctas(self) -> int:
        """Of the grid."""
        return math.prod(self.grid)

    def arguments(self) -> list[tuple[Any, Any]]:
        """Of the call, each with its place in the schema."""
        return list(zip(self.func._schema.arguments, self.given, strict=True))

    def part(self, **numbers: int) -> Sum:
        """What the same launch executes with other sizes, and other numbers of the call."""
        numbers = {name: value for name, value in numbers.items() if self.n[name] != value}
        return _executed(self, tuple(sorted(numbers.items())))

    def call(self, numbers: dict[str, int]) -> tuple[Any, ...]:
        """The arguments of that."""
        n = self.n | numbers
        given = []
        for argument, value in self.arguments():
            if isinstance(value, Tensor) and argument.name in SHAPES:
                if value.shape != SHAPES[argument.name](self.n):
                    raise RuntimeError(
                        f"{argument.name} of {self.subject.name} has shape {list(value.shape)}"
                    )
                info = argument.alias_info
                make = torch.empty if info is not None and info.is_write else torch.zeros
                shape = SHAPES[argument.name](n)
                turned = value.dim() == 2 and value.stride(0) == 1 != value.stride(1)
                made = make(shape[::-1] if turned else shape, dtype=value.dtype)
                given.append(made.t() if turned else made)
            elif isinstance(value, Tensor) and argument.name.startswith(_SCRATCH):
                given.append(value)
            elif type(value) is int:
                given.append(n[argument.name])
            else:
                given.append(value)
        return tuple(given)

    @functools.cached_property
    def registers(self) -> int:
        """Of a thread, by ptxas."""
        return registers(launchers().ptx_of(self.kernel, self.capability), self.capability)

    @property
    def ctas_of_an_sm(self) -> int:
        """That an SM holds at once, of those that it gets."""
        registers = -(-self.registers // 8) * 8 * self.threads
        fit = min(
            _THREADS_OF_AN_SM[self.capability] // self.threads,
            _SHARED_OF_AN_SM[self.capability] // (self.shared + _CTA_TAKES),
            _REGISTERS_OF_AN_SM // registers,
        )
        return min(fit, -(-self.ctas // SMS[self.capability]))


_known: dict[tuple[Any, ...], Sum] = {}


def _executed(whole: Whole, numbers: tuple[tuple[str, int], ...]) -> Sum:
    n = whole.n | dict(numbers)
    used = [a.name for a, v in whole.arguments() if isinstance(v, Tensor) and a.name in SHAPES]
    shapes = tuple(SHAPES[name](n) for name in used)
    values = tuple(n[a.name] for a, v in whole.arguments() if type(v) is int)
    key = whole.capability, whole.kernel, shapes, values
    if key not in _known:
        with launched(whole.capability, seed=2, resident=1, sms=SMS[whole.capability]) as run:
            whole.func(*whole.call(dict(numbers)))
        (one,) = run.launches
        if (one.symbol, math.prod(one.block)) != (whole.kernel, whole.threads):
            raise RuntimeError(f"a part of {whole.subject.name} runs another kernel than all")
        _known[key] = Sum.of(one.ran)
    return _known[key]


def planned(subject: Subject, device: Device) -> Planned | str:
    """What the family launches; or why it doesn't."""
    family = importlib.import_module(f"lorafast.backends.cuda.{subject.family}")
    found: Planned | str = getattr(family, f"plan_{subject.operation}")(subject.problem(), device)
    return found


def whole_of(subject: Subject, capability: int) -> Whole | str:
    """The launch at full size; or, where the family doesn't serve it, why."""
    if subject.operation == "mask":
        run, arguments = _run_mask, (subject.sizes,)
    else:
        found = planned(subject, Device.known_by("", capability, SMS[capability]))
        if isinstance(found, str):
            return found
        run, arguments = found.run, subject.arguments()
    asked: list[tuple[str, tuple[int, int, int], int, int]] = []

    def keep(launch: Launch) -> int:
        grid: Any = tuple(launch.grid)
        asked.append((launch.kernel.decode(), grid, math.prod(launch.block), launch.shared))
        return 0

    of = launchers()
    of.device(capability, SMS[capability], FAKE_STREAM)
    of.to(keep)
    try:
        with _Calls() as calls:
            run(*arguments)
    finally:
        of.reset()
    if len(calls.found) != 1 or len(asked) != 1:
        raise RuntimeError(f"{subject.name} is {len(asked)} launches, only one can be counted")
    ((func, given),) = calls.found
    return Whole(subject, capability, func, given, *asked[0])


def _run_mask(sizes: tuple[int, int, int, int]) -> None:
    from lorafast.backends.cuda.mask import mask

    mask(torch.zeros(1, dtype=torch.int64), round(_DROPOUT * 65536), *sizes[:2])


# How each operation scales: the whole launch, a step, and the steps of all CTAs.

Scaled = tuple[Sum, Sum, int]


def _tiles(n: int, of: int) -> int:
    if n % of:
        raise RuntimeError(f"{n} is not a multiple of {of}: a part does not scale")
    return n // of


def _line(at: float, first: int, other: int, of: Callable[[int], Sum]) -> tuple[Sum, Sum]:
    """A Sum that is a line of the number: at ``at`` by two others, and its slope."""
    one = of(first)
    slope = of(other).plus(one, -1).times(1 / (other - first))
    return one.plus(slope, at - first), slope


def _loop(steps: int, stages: int, of: Callable[[int], Sum]) -> tuple[Sum, Sum]:
    """Of a loop of so many steps over a ring, and a step, by loops that are longer than the ring."""
    if steps > stages:
        return _line(steps, stages, stages + 1, of)
    return _line(steps, steps, steps + 1, of)


def _shrink(whole: Whole, along: str = "K", across: str = "M") -> Scaled:
    """``along``: the dimension that a CTA walks, in steps of a block, for its share of them."""
    n, (blocks, shares, ranks) = whole.n, whole.grid
    of = {"M": n["block_m"], "N": n["block_n"], "K": n["block_n"]}
    steps = _tiles(n[along], of[along])
    assert blocks == _tiles(n[across], of[across])

    def walks(share: int) -> Sum:
        """Of one block across."""
        size = {along: share * shares * of[along], across: of[across]}
        return whole.part(**size, share=share)

    one, step = _loop(n["share"], n["stages"], walks)
    step = step.times(1 / (shares * ranks))
    missing = n["share"] * shares - steps  # of the last share
    return one.times(blocks).plus(step, -missing * blocks * ranks), step, blocks * ranks * steps


def _shrink_backward(whole: Whole) -> Scaled:
    return _shrink(whole, "M", "K")


def _expand_backward(whole: Whole) -> Scaled:
    n, (blocks, groups, ranks) = whole.n, whole.grid
    tiles, share = _tiles(n["M"], n["block_m"]), n["share"]
    assert blocks == _tiles(n["N"], n["block_n"])

    def part(columns: int, tiles: int, share: int, chunk: int) -> Sum:
        M, N = tiles * n["block_m"], columns * n["block_n"]
        return whole.part(M=M, N=N, share=share, chunk=chunk)

    chunk, stages = n["chunk"], n["stages"]
    last = tiles - (groups - 1) * share

    def group(columns: int, length: int) -> tuple[Sum, Sum]:
        """Of one row group, a walk of so many tiles in its chunks; and a tile of it."""
        one, tile = _loop(length, stages, lambda tiles: part(columns, tiles, tiles, tiles))
        if length <= stages + 1:
            return part(columns, length, share, chunk), tile
        more = part(columns, 2, 2, 1).plus(part(columns, 2, 2, 2), -1)
        return one.plus(more, -(-length // chunk) - 1), tile

    def wide(length: int) -> tuple[Sum, Sum]:
        """The same of all columns; sums of ds are added four parts at a time, from five on."""
        few = 8 + blocks % 4
        if blocks < 2 * few + 4:
            return group(blocks, length)
        ones, others = group(few, length), group(few + 4, length)
        times = (blocks - few) / 4
        walk, tile = (a.plus(b.plus(a, -1), times) for a, b in zip(ones, others, strict=True))
        return walk, tile

    (walk, tile), (short, _) = wide(share), wide(last)
    found = walk.times(groups - 1).plus(short)
    if groups > 1:
        found = found.plus(part(1, groups, 1, 1).plus(part(1, 1, 1, 1), -groups), blocks)
    return found, tile.times(1 / (blocks * ranks)), blocks * ranks * tiles


def _expand(whole: Whole) -> Scaled:
    n, (across, down, _) = whole.n, whole.grid
    rows, columns = 256 // n["column_warps"], 32 * n["column_warps"]
    steps = _tiles(n["M"], rows)
    assert across == _tiles(n["N"], columns)

    def down_to(steps: int, **numbers: int) -> Sum:
        """Of a column block."""
        return whole.part(M=steps * rows, N=columns, **numbers)

    # A CTA with others below it loads their first rows of s, too.
    each = n["row_blocks"]
    last = steps - (down - 1) * each
    found = down_to(last)
    if down > 1:
        found = found.plus(down_to(each + last).plus(found, -1), down - 1)
    _, step = _loop(each, 2, lambda steps: down_to(steps, row_blocks=steps))
    return found.times(across), step, across * steps


_RING = 3
"""Stages of ``linear_expand``."""


def _linear_expand(whole: Whole) -> Scaled:
    n, rows = whole.n, 128
    block = 64 if n["columns"] == 256 else 32
    tiles = _tiles(n["M"], rows) * _tiles(n["N"], n["columns"])
    blocks, splits = _tiles(n["K"], block), n["splits"]
    assert whole.ctas == tiles * splits

    def cut(steps: int) -> Sum:
        """Of one tile, each of whose shares has so many."""
        return whole.part(M=rows, N=n["columns"], K=steps * splits * block)

    first, step = _line(blocks / splits, _RING, _RING + 1, cut)
    step = step.times(1 / splits)
    step["ahead"] = step["copied"] * (_RING - 1)
    return first.times(tiles), step, tiles * blocks


def _lora_linear(whole: Whole) -> Scaled:
    n, (across, down, _) = whole.n, whole.grid
    rows, columns, block = 64, n["columns"], 64
    steps = _tiles(n["K"], block)
    assert (across, down) == (_tiles(n["N"], columns), _tiles(n["M"], rows))

    def ctas(count: int, steps: int = steps) -> Sum:
        return whole.part(M=rows, N=count * columns, K=steps * block)

    first, step = _loop(steps, n["stages"], lambda steps: ctas(1, steps))
    second, _ = _loop(steps, n["stages"], lambda steps: ctas(2, steps))
    found = first.plus(second.plus(first, -1), across - 1).times(down)
    return found, step, across * down * steps


_DECODED_STEP = 256
"""Elements along K that a CTA's warps take together."""


def _decode(whole: Whole) -> Scaled:
    n = whole.n
    blocks = whole.ctas - n["helpers"]
    rows, steps = _tiles(n["N"], blocks), _tiles(n["K"], _DECODED_STEP)

    def ctas(steps: int) -> tuple[Sum, Sum]:
        """Of the whole launch, and of a CTA that has rows of W."""
        K = steps * _DECODED_STEP
        return _line(blocks, 1, 2, lambda count: whole.part(N=count * rows, K=K))

    (found, cta), (_, half) = ctas(steps), ctas(steps // 2)
    step = cta.plus(half, -1).times(1 / (steps - steps // 2))
    # What a CTA has asked for before it first multiplies.
    first = min(_lines(cta, "multiplied"))
    step["ahead"] = sum(n for line, n in _lines(cta, "streamed").items() if line < first)
    return found, step, blocks * steps


def _lines(of: Sum, what: str) -> dict[int, float]:
    """The lines of the PTX that do this, and how much."""
    found = {name: value for name, value in of.items() if value and name.startswith(what)}
    return {int(name.rpartition(" ")[2]): value for name, value in found.items()}


def _decode_from_memory(whole: Whole, found: Sum) -> float:
    """Bytes of W, A and B as often as they are loaded, of x and y once: each CTA loads x and s again,
    from L2, and A where it makes its own s."""
    M, K, N, r = whole.subject.sizes
    streamed = 32.0 * sum(value for name, value in found.items() if name.startswith("streamed"))
    if not whole.n["helpers"]:
        of_A = streamed - 2.0 * N * (K + r)
        streamed -= of_A * (1 - 1 / whole.ctas)
    return streamed + 2.0 * M * (K + N)


def _mask_bits(whole: Whole) -> Scaled:
    rows = _tiles(whole.n["M"], whole.ctas)
    return whole.part(M=rows).times(whole.ctas), Sum(), 0


_SCALED: dict[tuple[str, str], Callable[[Whole], Scaled]] = {
    ("skinny", "shrink"): _shrink,
    ("skinny", "shrink_backward"): _shrink_backward,
    ("skinny", "expand_backward"): _expand_backward,
    ("small", "expand"): _expand,
    ("small", "lora_linear"): _lora_linear,
    ("linear_expand", "linear_expand"): _linear_expand,
    ("decode", "lora_linear"): _decode,
    ("mask", "mask"): _mask_bits,
}
_FROM_L2 = ("lora_linear", "small"), ("linear_expand", "linear_expand")
"""Operations and families whose operands are read several times, or small: memory is L2."""


def scaled(whole: Whole) -> Scaled:
    """A whole launch by parts of it, a step of a CTA's main loop, and the steps of all CTAs.

    Raises RuntimeError for sizes that leave a part of a tile over.
    """
    return _SCALED[whole.subject.family, whole.subject.operation](whole)


def count(subject: Subject, capability: int) -> Row | str:
    """The row of a kernel at one size; or, where the family doesn't serve it, why."""
    whole = whole_of(subject, capability)
    if isinstance(whole, str):
        return whole
    found, step, steps = scaled(whole)
    each = steps / whole.ctas
    tile = found.times(1 / whole.ctas).plus(step, -each)
    ahead = 32 * (step["ahead"] or step["copied"] * (whole.n.get("stages", 1) - 1))
    decoded = subject.family == "decode"
    variant = " ".join(filter(None, (subject.variant, "dropout" * subject.dropout)))
    return Row(
        subject.operation, variant, capability, *subject.sizes,
        step.amounts, tile.amounts, Sum().amounts, each, whole.ctas,
        ahead * whole.ctas_of_an_sm, (subject.operation, subject.family) in _FROM_L2,
        whole.registers, backend="cuda",
        from_memory=_decode_from_memory(whole, found) if decoded else 0.0,
    )  # fmt: skip


def subjects() -> list[Subject]:
    """Each kernel at the sizes that matter to it, once."""
    found = {}
    for r in RANKS:
        for M, K, N in LAYERS:
            for operation, family, dropout in (
                ("shrink", "skinny", False), ("shrink", "skinny", True),
                ("expand", "small", False), ("expand", "small", True),
                ("expand_backward", "skinny", False),
                ("shrink_backward", "skinny", False), ("shrink_backward", "skinny", True),
            ):  # fmt: skip
                key = operation, dropout, what_matters(operation, M, K, N, r)
                found.setdefault(key, Subject(operation, family, (M, K, N, r), dropout))
    small = [Subject("lora_linear", "small", (*SMALL, r), variant="small") for r in RANKS]
    decoded = [
        Subject("lora_linear", "decode", (*layer, r), variant="decode")
        for layer in (*DECODED, *DECODED_SMALL) for r in RANKS
    ]  # fmt: skip
    fused = [
        Subject("linear_expand", "linear_expand", (*layer, r), dropout, variant)
        for layer in (*LAYERS, WIDE) for r in RANKS
        for variant, dropout in (("forward", False), ("dx", False), ("dx", True))
    ]  # fmt: skip
    return [*found.values(), *small, *decoded, *fused, Subject("mask", "mask", (8192, 4096, 0, 0))]


def registers(ptx: str, capability: int) -> int:
    """Of a thread of the one kernel of a module, by ptxas, which may not spill."""
    target = nvcc.TARGETS[capability]
    key = hashlib.sha256("\0".join((ptx, target, nvcc.version(nvcc.path()))).encode()).hexdigest()[
        :16
    ]
    kept = nvcc.BUILD / f"ptxas-{target}-{key}.txt"
    if not kept.exists():
        source = kept.with_suffix(".ptx")
        source.write_text(ptx)
        done = subprocess.run(
            [nvcc.path(), "-cubin", f"-arch={target}", "-Xptxas=-v", str(source), "-o", "/dev/null"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        source.unlink()
        if done.returncode:
            raise RuntimeError(f"ptxas refuses what nvcc has made for {target}:\n{done.stderr}")
        kept.write_text(done.stderr)
    said = kept.read_text()
    used = re.search(r"Used (\d+) registers", said)
    if used is None:
        raise RuntimeError(f"ptxas does not say how many registers a thread has:\n{said}")
    return int(used[1])


def rows(capability: int) -> list[Row]:
    """Of every kernel that serves a size."""
    found = (count(subject, capability) for subject in subjects())
    return [row for row in found if isinstance(row, Row)]
