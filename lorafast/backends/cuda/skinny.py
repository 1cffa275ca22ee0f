"""What the skinny operations are launched with: ``shrink``, ``expand_backward``, ``shrink_backward``.

Each is one launch of a kernel of ``csrc/cuda/skinny.cuh``, whose three kinds differ in how a CTA walks
the large matrix, x or dy:

- ``shrink`` along the columns of a row block. Its sums are s; where row blocks are few their columns are
  shared out.
- ``reduce`` down the rows of a column block. Its sums are dA, or dB and dbias.
- ``backward`` as ``reduce``, and leaves ds besides: a part of it in each column block.

What is shared out leaves parts in float32, which the last CTA to arrive adds up in a fixed order: two
runs give the same bits. Ranks beyond an instance's take more CTAs, which read the large matrix again.
``backward`` may have smaller instances than the rank for the sake of more CTAs: its column blocks are
few, and each row group more is a part of dB more to add up.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafast.backends.cost import Device
from lorafast.backends.cuda.launch import NO_MASK, NONE, Choices, Launch, mask_of
from lorafast.backends.cuda.tables import SKINNY, SkinnyRow, row_of
from lorafast.core.dtypes import wide
from lorafast.core.problem import Problem
from lorafast.kernels.common.counters import counters

_OLDEST = 75
_BFLOAT16 = 80
"""The first compute capability whose tensor cores multiply it."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PAD = 16
"""Bytes after a row of a tile in shared memory."""
_OWN = 16
"""Bytes of shared memory that the kernel declares itself, for the number that ``arrive`` hands round:
they count too."""
_MOST_STAGES = 8
_FEWEST_STAGES = 2
"""Of a ring."""
_MOST_PARTS = 64
_START = 2.0
"""Tiles whose time a CTA takes to fill its ring."""
_TWO_RESIDENT = 32
"""Ranks up to which registers let two CTAs on an SM, where there is a ring."""
_CHUNKS = 4
"""Times in its walk that a CTA of ``backward`` asks whether ds can be added up."""
_AGAIN = 0.5
"""Time to read a byte of the large matrix that other rank blocks read beside it, from L2, by that of one
from memory."""
_ISSUED = {torch.bfloat16: (0.26, 0.0103), torch.float32: (1.1, 0.069), torch.float16: (1.1, 0.123)}
"""Time to issue what ``backward`` does with a tile by the time to read it from memory: a constant, and
by rank. From counts on sm_90 (tests/ptx/cuda_counts.py)."""
_WORTH = 0.9
"""The share of its time that a launch of more rank blocks may take at most."""
_PART = 0.2
"""Time to read a byte of a part from L2 by that of a byte of the large matrix from memory."""


@dataclass(frozen=True)
class Tile:
    """An instance of the kernel: ``SkinnyTile`` of skinny.cuh. ``shared``: bytes before the ring, and of
    each stage."""

    kind: str
    ranks: int
    rows: int
    columns: int
    before: int
    stage: int
    x: int

    def bytes_of(self, stages: int) -> int:
        """Of shared memory."""
        return self.before + stages * self.stage


@functools.cache
def tile_of(kind: str, dtype: torch.dtype, ranks: int, split: bool = False) -> Tile:
    """The instance for so many ranks; ``split``: its float32 factors lie there as three float16."""
    size, beside = dtype.itemsize, wide(dtype).itemsize
    bf16 = dtype is torch.bfloat16
    if kind == "shrink":
        rows, columns = 128 if bf16 else 64, 128 if size == 2 and ranks <= 32 else 64
    elif kind == "reduce":
        rows, columns = (128 if ranks < 64 else 64) if bf16 else 64 if size == 2 else 32, 128
    else:
        rows, columns = (64 if ranks <= 16 else 32) if bf16 else 32, 256 if bf16 else 128
    x = rows * (columns * size + _PAD)
    of_p, of_q = ranks * (columns * beside + _PAD), rows * (ranks * beside + _PAD)
    if split:  # and the scale of each eight
        of_p, of_q = (
            3 * ranks * (2 * along + _PAD) + along // 8 * ranks * 4 for along in (columns, rows)
        )
    sums = 4 * rows * ranks * 4
    before = 0 if kind != "backward" else max(of_p, sums) if bf16 else of_p + sums
    stage = x + (of_p if kind == "shrink" else of_q)
    return Tile(kind, ranks, rows, columns, before, stage, rows * columns * size)


def ranks_of(kind: str, dtype: torch.dtype) -> tuple[int, ...]:
    """The instances that there are."""
    return (16, 32, 64, 128) if dtype is torch.bfloat16 and kind != "backward" else (16, 32, 64)


@dataclass(frozen=True)
class Shares:
    """How a launch is cut. ``grid``: blocks across the walk, shares of it, rank blocks; ``share``: tiles
    of one; ``chunk``: those after which ds is added up. ``partials``: float32 of scratch memory."""

    tile: Tile
    stages: int
    ctas_per_sm: int
    grid: tuple[int, int, int]
    share: int
    chunk: int
    partials: int
    counters: int

    @property
    def arguments(self) -> tuple[int, ...]:
        """As the operations take them, but for ``chunk``."""
        tile = self.tile
        return tile.ranks, tile.rows, tile.columns, self.stages, self.share

    @property
    def choices(self) -> Choices:
        """As ``Launch`` has them."""
        return {"ranks": self.tile.ranks, "share": self.share, "stages": self.stages}

    @property
    def in_flight(self) -> int:
        """Bytes of the large matrix that an SM asks for ahead of their use. A CTA whose walk is no
        longer than that asks for all of it. Without a ring they are a tile in registers."""
        return self.ctas_per_sm * max(self.stages - 1, 1) * self.tile.x


def shares_of(
    kind: str,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    r: int,
    *,
    row: SkinnyRow,
    sms: int,
    has_d: bool = True,
    has_bias: bool = False,
    dropout: bool = False,
    fixed: Choices = NONE,
) -> Shares:
    """Of a large matrix ``[rows, columns]`` on an architecture with ``row``."""
    split = not row.ring and dtype is torch.float16
    fitting = [
        tile for tile in (tile_of(kind, dtype, ranks, split) for ranks in ranks_of(kind, dtype))
        if tile.bytes_of(_fewest(row)) + _OWN <= row.shared
    ]  # fmt: skip
    enough = next((i for i, tile in enumerate(fitting) if tile.ranks >= r), len(fitting) - 1)
    tiles = fitting[: enough + 1] if kind == "backward" else [fitting[enough]]
    tiles = [tile for tile in tiles if tile.ranks == fixed.get("ranks")] or tiles
    cut, *others = (
        _cut(kind, dtype, one, rows, columns, r, row, sms, dropout) for one in tiles[::-1]
    )
    for other in others:
        cut = other if other.seconds < _WORTH * cut.seconds else cut
    tile, across, ranks = cut.tile, cut.across, cut.ranks
    shortest = max(_blocks(cut.along, _MOST_PARTS), 1)
    share = min(max(fixed.get("share", cut.share), shortest), max(cut.along, 1))
    row_tiles = _blocks(rows, tile.rows)
    count = max(_blocks(cut.along, share), 1)
    chunk = _blocks(share, _CHUNKS) if kind == "backward" else 1
    of_s = of_d = of_bias = used = 0
    parts_of_s = {"shrink": count, "reduce": 1, "backward": across}[kind]
    if parts_of_s > 1:
        of_s = ranks * parts_of_s * row_tiles * tile.rows * tile.ranks
    if kind != "shrink" and count > 1:
        of_d = ranks * count * across * tile.columns * tile.ranks if has_d else 0
        of_bias = count * across * tile.columns * 4 if has_bias else 0
    if of_s or of_d or of_bias:
        if kind != "reduce":
            used = ranks * (across if kind == "shrink" else count * _blocks(share, chunk))
        if kind != "shrink":
            used += ranks * across
    grid = across, count, ranks
    ctas = min(cut.ctas, max(_blocks(across * count * ranks, sms), 1))  # others never come
    stages = fixed.get("stages", min(_stages(tile, row, ctas), share + 1))
    stages = max(min(stages, _most(row), _room(tile, row, ctas)), _fewest(row))
    return Shares(tile, stages, ctas, grid, share, chunk, of_s + of_d + of_bias, used)


@dataclass(frozen=True)
class _Cut:
    """A launch cut into CTAs by one instance: blocks across and tiles along the walk, rank blocks, tiles
    of a CTA; ``seconds`` in bytes of the large matrix that an SM reads in that time."""

    tile: Tile
    ctas: int
    across: int
    along: int
    ranks: int
    share: int
    seconds: float


def _cut(
    kind: str,
    dtype: torch.dtype,
    tile: Tile,
    rows: int,
    columns: int,
    r: int,
    row: SkinnyRow,
    sms: int,
    dropout: bool,
) -> _Cut:
    ctas = 1
    # One makes its mask, or without a ring loads, while the other multiplies.
    two = not row.ring or (dropout and tile.ranks <= _TWO_RESIDENT)
    if two and _stages(tile, row, 2) >= _fewest(row):
        ctas = 2
    ranks = _blocks(r, tile.ranks)
    row_tiles, column_tiles = _blocks(rows, tile.rows), _blocks(columns, tile.columns)
    across, along = (row_tiles, column_tiles) if kind == "shrink" else (column_tiles, row_tiles)
    each = 1.0
    if kind == "backward":
        across = max(across, 1)
        constant, by_rank = _ISSUED[dtype]
        each = max((1 + (ranks - 1) * _AGAIN) / ranks, constant + by_rank * tile.ranks)
    part = tile.ranks * 4 * (tile.rows if kind == "shrink" else tile.columns) * _PART / tile.x
    share, tiles = _share(across * ranks, along, sms * ctas, each, part)
    return _Cut(tile, ctas, across, along, ranks, share, tiles * tile.x)


def _stages(tile: Tile, row: SkinnyRow, ctas: int) -> int:
    """Of the ring of each of so many CTAs on an SM: what memory needs, as far as there is room."""
    wanted = _blocks(row.in_flight, ctas * tile.x) + 1
    return min(max(wanted, _fewest(row)), _most(row), _room(tile, row, ctas))


def _fewest(row: SkinnyRow) -> int:
    """Stages that a CTA must have."""
    return _FEWEST_STAGES if row.ring else 1


def _most(row: SkinnyRow) -> int:
    """Stages that a CTA can have."""
    return _MOST_STAGES if row.ring else 1


def _room(tile: Tile, row: SkinnyRow, ctas: int) -> int:
    """The stages that shared memory has room for."""
    room = min(row.shared, row.on_sm // ctas - 1024) - _OWN
    return (room - tile.before) // tile.stage


def _share(blocks: int, along: int, slots: int, each: float, part: float) -> tuple[int, float]:
    """Tiles of a walk that is cut so that the launch ends first, and when that is: in rounds of CTAs,
    each of which takes as long as its tiles (``each``); whoever adds up reads every part (``part``)."""

    def seconds(parts: int) -> float:
        rounds = _blocks(blocks * parts, slots)
        return rounds * (_blocks(along, parts) + _START) * each + (
            parts * part if parts > 1 else 0.0
        )

    parts = min(range(1, max(min(along, _MOST_PARTS), 1) + 1), key=seconds)
    return max(_blocks(along, parts), 1), seconds(parts)


def plan_shrink(problem: Problem, device: Device, fixed: Choices = NONE) -> Launch | str:
    """``s = drop(x)·Aᵀ``: ``run(x, lora_A, dropout_p, seed)``."""
    p = problem
    reason = _why_refused(p, device)
    if reason is not None:
        return reason
    shares = shares_of(
        "shrink", p.dtype, p.M, p.K, p.r,
        row=row_of(SKINNY, device.capability), sms=device.sms, dropout=p.dropout,
        fixed=fixed,
    )  # fmt: skip
    M, r, low, dropout = p.M, p.r, wide(p.dtype), p.dropout
    arguments = shares.arguments

    def run(
        x: Tensor, lora_A: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None
    ) -> Tensor:
        s = torch.empty((M, r), dtype=low, device=x.device)
        mask = mask_of(dropout, dropout_p, seed)
        torch.ops.lorafast_cuda.shrink.default(
            x, lora_A, *mask, 1.0, s, *_scratch(shares, x), *arguments
        )
        return s

    moved = _moved(p, shares, p.M, p.K) + p.r * p.K * p.adapter_dtype.itemsize
    return Launch(
        run, _line("shrink", shares), 2.0 * p.M * p.K * p.r, moved, choices=shares.choices
    )


def plan_shrink_backward(problem: Problem, device: Device, fixed: Choices = NONE) -> Launch | str:
    """``dA = dsᵀ·drop(x)``: ``run(ds, x, dropout_p, seed)``."""
    p = problem
    reason = _why_refused(p, device)
    if reason is not None:
        return reason
    shares = shares_of(
        "reduce", p.dtype, p.M, p.K, p.r,
        row=row_of(SKINNY, device.capability), sms=device.sms, dropout=p.dropout,
        fixed=fixed,
    )  # fmt: skip
    K, r, dtype, dropout = p.K, p.r, p.adapter_dtype, p.dropout
    arguments = shares.arguments

    def run(ds: Tensor, x: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
        dA = torch.empty((r, K), dtype=dtype, device=x.device)
        mask = mask_of(dropout, dropout_p, seed)
        torch.ops.lorafast_cuda.shrink_backward.default(
            ds, x, *mask, dA, *_scratch(shares, x), *arguments
        )
        return dA

    moved = _moved(p, shares, p.M, p.K) + p.r * p.K * p.adapter_dtype.itemsize
    return Launch(
        run, _line("shrink_backward", shares), 2.0 * p.M * p.K * p.r, moved, choices=shares.choices
    )


Sums = tuple[Tensor | None, Tensor | None, Tensor | None]
"""``ds``, ``dB`` and ``dbias``, None for what isn't wanted."""


def plan_expand_backward(problem: Problem, device: Device, fixed: Choices = NONE) -> Launch | str:
    """``ds = scaling · dy·B``, ``dB = scaling · dyᵀ·s``, ``dbias = Σ dy``: of them what is wanted, by
    ``run(dy, s, lora_B, scaling)``.

    ``ds`` alone is a ``shrink`` of dy. Without a ring it is one beside the others too, where a second
    pass over dy moves less than the parts of ds that column blocks would leave.
    """
    p = problem
    reason = _why_refused(p, device)
    if reason is not None:
        return reason
    want_ds, want_dB, want_dbias = (name in p.wants for name in ("ds", "dB", "dbias"))
    alone = want_ds and not (want_dB or want_dbias)
    kind = "shrink" if alone else "backward" if want_ds else "reduce"
    r = p.r if want_ds or want_dB else 1
    row = row_of(SKINNY, device.capability)
    shares = shares_of(
        kind, p.dtype, p.M, p.N, r, row=row, sms=device.sms, has_d=want_dB, has_bias=want_dbias,
        fixed=fixed,
    )  # fmt: skip
    if kind == "backward" and not row.ring and fixed in (NONE, _APART):
        others = tuple(name for name in p.wants if name != "ds")
        two = [plan_expand_backward(p._replace(wants=wants), device) for wants in (("ds",), others)]
        apart = _apart(*two)
        if fixed == _APART or apart.moved < _moved_by(p, shares):
            return apart
    M, N, low, own, dtype = p.M, p.N, wide(p.dtype), p.dtype, p.adapter_dtype
    arguments, chunk = shares.arguments, shares.chunk

    def ds_alone(dy: Tensor, s: Tensor | None, lora_B: Tensor, scaling: float) -> Sums:
        ds = torch.empty((M, r), dtype=low, device=dy.device)
        torch.ops.lorafast_cuda.shrink.default(
            dy, lora_B.t(), *NO_MASK, float(scaling), ds, *_scratch(shares, dy), *arguments
        )
        return ds, None, None

    def run(dy: Tensor, s: Tensor | None, lora_B: Tensor | None, scaling: float) -> Sums:
        device = dy.device
        ds = torch.empty((M, r), dtype=low, device=device) if want_ds else None
        dB = torch.empty((N, r), dtype=dtype, device=device) if want_dB else None
        dbias = torch.empty((N,), dtype=own, device=device) if want_dbias else None
        torch.ops.lorafast_cuda.expand_backward.default(
            dy, s if want_dB else None, lora_B if want_ds else None, float(scaling), ds, dB, dbias,
            *_scratch(shares, dy), *arguments, chunk,
        )  # fmt: skip
        return ds, dB, dbias

    flops = 2.0 * p.M * p.N * p.r * (want_ds + want_dB) + want_dbias * p.M * p.N
    return Launch(
        ds_alone if alone else run, _line("expand_backward", shares), flops, _moved_by(p, shares),
        choices=shares.choices,
    )  # fmt: skip


_APART: Choices = {"apart": 1}


def _apart(of_ds: Launch | str, others: Launch | str) -> Launch:
    """``expand_backward`` in two launches."""
    assert isinstance(of_ds, Launch)
    assert isinstance(others, Launch)

    def run(dy: Tensor, s: Tensor | None, lora_B: Tensor | None, scaling: float) -> Sums:
        ds, _, _ = of_ds.run(dy, None, lora_B, scaling)
        _, dB, dbias = others.run(dy, s, None, scaling)
        return ds, dB, dbias

    return Launch(
        run, f"{of_ds.line}; {others.line}", of_ds.flops + others.flops, of_ds.moved + others.moved,
        launches=2, choices=_APART,
    )  # fmt: skip


def _moved_by(p: Problem, shares: Shares) -> float:
    """Bytes of ``expand_backward``."""
    products = ("ds" in p.wants) + ("dB" in p.wants)
    moved = _moved(p, shares, p.M, p.N) + ("dbias" in p.wants) * p.N * p.dtype.itemsize
    return moved + products * p.N * p.r * p.adapter_dtype.itemsize


def _scratch(shares: Shares, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The parts of sums and the counters, where sums are shared."""
    if not shares.partials:
        return None, None
    partials = torch.empty(shares.partials, dtype=torch.float32, device=x.device)
    return partials, counters(x, shares.counters)


def _why_refused(p: Problem, device: Device) -> str | None:
    if device.capability < _OLDEST:
        has, needs = (".".join(map(str, divmod(c, 10))) for c in (device.capability, _OLDEST))
        return f"compute capability is {has}, the kernels of {p.operation} need {needs}"
    if p.dtype is torch.bfloat16 and device.capability < _BFLOAT16:
        has = ".".join(map(str, divmod(device.capability, 10)))
        return f"compute capability is {has}, the kernels of {p.operation} in bfloat16 need 8.0"
    if p.dtype not in _DTYPES:
        return f"the dtype is {p.dtype}, the kernels have float16, bfloat16 and float32"
    if p.adapter_dtype not in _DTYPES:
        return f"the adapter is {p.adapter_dtype}, the kernels have float16, bfloat16 and float32"
    if p.r < 1 and p.wants != ("dbias",):  # which has none
        return f"the rank is {p.r}, the kernels need at least 1"
    return None


def _moved(p: Problem, shares: Shares, rows: int, columns: int) -> float:
    """Bytes of the large matrix, of what has r columns, and of the parts, written and read."""
    ranks = shares.grid[2]
    wants = p.wants if p.operation == "expand_backward" else ("ds",)
    low = sum(name in wants for name in ("ds", "dB"))
    moved = float(ranks * rows * columns * p.dtype.itemsize)
    return moved + low * rows * p.r * wide(p.dtype).itemsize + 8.0 * shares.partials


def _line(operation: str, shares: Shares) -> str:
    tile = shares.tile
    grid = " x ".join(map(str, shares.grid))
    return (
        f"{operation}: {grid} CTAs, tiles of {tile.rows} x {tile.columns} for {tile.ranks} ranks, "
        f"{shares.stages} stages"
    )


def _blocks(n: int, of: int) -> int:
    return -(-n // of)
