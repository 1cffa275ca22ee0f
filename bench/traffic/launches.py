"""Bytes of our Triton kernels in closed form, and a stand-in for their backend that adds them up.

A kernel's *traffic* counts every byte that a launch touches once, reading and writing: what goes
through device memory if the cache keeps what programs of one launch share. Its *requests* are what the
programs load and store, shared tiles again each time: what the cache has to serve. Both follow from
the loops of ``kernels/<op>/kernel.py``; ``interpret`` counts them there and holds them against this.
Flags and counters, a few bytes, are left out.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lorafast.kernels.common.bottleneck_plan import (
    BottleneckBackwardLaunch,
    BottleneckLaunch,
    ColumnsLaunch,
)
from lorafast.kernels.common.codes_plan import CodesLaunch, scales_apart
from lorafast.kernels.common.decode_plan import DecodeLaunch
from lorafast.kernels.common.plan import (
    ExpandBackwardLaunch,
    ExpandLaunch,
    LinearExpandLaunch,
    LoraLinearLaunch,
    ShrinkBackwardLaunch,
    ShrinkLaunch,
    WeightNormLaunch,
)
from lorafast.kernels.common.scaled_plan import (
    ScaledGemmLaunch,
    ScaledLinearLaunch,
    ScaledPassLaunch,
)

from lorafast import operands
from lorafast.backends import cost, registry
from lorafast.backends.cost import Device
from lorafast.backends.plan import Plan, Refusal, Run
from lorafast.backends.triton import Triton
from lorafast.backends.triton.planning import HybridLaunch
from lorafast.backends.triton.planning import Launch as Planned
from lorafast.core.problem import WEIGHT_NORM, Layout, Layouts, Problem
from lorafast.operands import MXFP4, Weight
from lorafast.operands.eight_bit import EightBit
from lorafast.operands.four_bit import FourBit
from lorafast.reference import wide

H200_SMS = 132
_SEED = 8
_PARTIAL = 4
_NUMBER = 4
"""Of a number that codes stand for, and of a scale."""
_NUMBERS = 16 * _NUMBER
# As kernels/dequantize/kernel.py has them, which only Triton imports: elements that a thread makes at
# once, and such groups of a program. The interpreter's counts hold them to that.
PER_GROUP, GROUPS = 8, 512


def h200(sms: int = H200_SMS) -> Device:
    """An H200, or one of another size."""
    return Device.known_by("NVIDIA H200", 90, sms, 1.98e9, 3.2e9, 6144)


@dataclass(frozen=True)
class Launch:
    """One kernel: bytes read and written, each once, and bytes loaded and stored by its programs.

    ``helped`` of those read are what helpers read beside the GEMM's own tiles: they are counted once,
    but nothing makes sure that the cache still has them when the other comes. ``by_pytorch``: it is
    PyTorch's own, of which nobody knows what its programs load and store.
    """

    read: int
    written: int
    loaded: int
    stored: int
    helped: int = 0
    by_pytorch: bool = False


@functools.singledispatch
def traffic_of(launch: Planned, p: Problem) -> list[Launch]:
    """The kernels of a launch, one by one; ``p`` has the dtypes."""
    raise NotImplementedError(type(launch))


@traffic_of.register
def _shrink(launch: ShrinkLaunch, p: Problem) -> list[Launch]:
    """Every row block reads A, every rank block reads x."""
    rows, count, ranks = launch.grid
    x, A, s = launch.M * launch.K * _size(p), launch.r * launch.K * _adapter(p), _low(p, launch.M)
    seed = _SEED if launch.dropout else 0
    partials = _partials(count, launch.M * launch.r)
    return [
        Launch(
            x + A + seed + partials,
            s + partials,
            ranks * x + rows * A + rows * count * ranks * seed + partials,
            s + partials,
        )
    ]


@traffic_of.register
def _expand(launch: ExpandLaunch, p: Problem) -> list[Launch]:
    """Every column block reads s, every row group reads B and keeps it, or reads it for each row block
    where the rank has several."""
    cols, groups = launch.grid
    if launch.rank_blocks > 1:
        groups = _blocks(launch.M, launch.config.block_m)
    s, y = _low(p, launch.M), launch.M * launch.N * _size(p)
    B = launch.N * launch.r * _adapter(p)
    bias = launch.N * _size(p) if launch.bias else 0
    seed = _SEED if launch.dropout else 0
    loaded = cols * s + groups * B + launch.grid[1] * (bias + cols * seed)
    return [Launch(s + B + bias + seed, y, loaded, y)]


@traffic_of.register
def _decode(launch: DecodeLaunch, p: Problem) -> list[Launch]:
    W = p.N * p.K * _size(p)
    return [_decoding(launch, p, W, W)]


def _decoding(launch: DecodeLaunch, p: Problem, stored: int, loaded: int) -> Launch:
    """Every tile reads x and s, which helpers make of x and A in shares, or of them its own s; and W,
    which is ``stored`` in so many bytes and loaded by so many."""
    x, s, y = p.M * p.K * _size(p), _low(p, p.M), p.M * p.N * _size(p)
    A, by_cols = p.r * p.K * _adapter(p), p.N * p.r * _adapter(p)
    if launch.bias:
        by_cols += p.N * _size(p)
    partials = _partials(launch.splits, p.M * p.N) + launch.shares * p.M * p.r * _PARTIAL
    skinny, written = launch.rank_blocks * x + A, y + s + partials
    if launch.shares:
        of_s, read = skinny + launch.tiles * s, x + A + s + stored + by_cols + partials
    else:
        of_s, read = launch.tiles * skinny, x + A + stored + by_cols + partials
    return Launch(read, written, launch.tiles * x + loaded + by_cols + of_s + partials, written)


@traffic_of.register
def _hybrid(launch: HybridLaunch, p: Problem) -> list[Launch]:
    """What ``expand`` writes is read and written again by the GEMM."""
    x, y = p.M * p.K * _size(p), p.M * p.N * _size(p)
    if launch.transposed:
        x, y = y, x
    gemm = Launch(x + p.N * p.K * _size(p) + y, y, 0, 0, by_pytorch=True)
    return [*traffic_of(launch.expand, p), gemm]


@traffic_of.register
def _linear_expand(launch: LinearExpandLaunch, p: Problem) -> list[Launch]:
    """Every column block reads x and s, every row block reads W, B and the bias."""
    partials = _partials(launch.splits, launch.M * launch.N)
    tiles = _tiles(launch, p)
    return [
        Launch(
            tiles.read + partials,
            tiles.written + partials,
            tiles.loaded + partials,
            tiles.stored + partials,
        )
    ]


def _tiles(launch: LinearExpandLaunch, p: Problem) -> Launch:
    """All tiles of a GEMM with their low-rank term; under a mask each share of a tile reads the seed."""
    c, K, N = launch.config, launch.K, launch.N
    rows, cols = _blocks(launch.M, c.block_m), _blocks(N, c.block_n)
    x, s, y = launch.M * K * _size(p), _low(p, launch.M), launch.M * N * _size(p)
    by_cols = N * K * _size(p) + N * p.r * _adapter(p) + (N * _size(p) if launch.bias else 0)
    seed = _SEED if launch.dropout else 0
    loaded = cols * (x + s) + rows * by_cols + rows * cols * launch.splits * seed
    return Launch(x + s + by_cols + seed, y, loaded, y)


@traffic_of.register
def _expand_backward(launch: ExpandBackwardLaunch, p: Problem) -> list[Launch]:
    """Every column group reads s, every row group reads B, every rank block reads dy."""
    cols, rows, ranks = launch.grid
    dy, s, B = p.M * p.N * _size(p), _low(p, p.M), p.N * p.r * _adapter(p)
    of_ds, ds = cols * p.M * p.r * _PARTIAL, _low(p, p.M)
    read, written, loaded = dy, 0, ranks * dy
    if "ds" in launch.wants:
        read, written, loaded = read + B, written + of_ds, loaded + rows * B
    if "dB" in launch.wants:
        partials = rows * p.N * p.r * _PARTIAL
        read, written = read + s + partials, written + partials + B
        loaded += cols * s + partials
    if "dbias" in launch.wants:
        partials = rows * p.N * _PARTIAL
        read, written, loaded = (
            read + partials,
            written + partials + p.N * _size(p),
            loaded + partials,
        )
    found = [Launch(read, written, loaded, written)]
    if "ds" in launch.wants:
        found.append(Launch(of_ds, ds, of_ds, ds))
    return found


@traffic_of.register
def _shrink_backward(launch: ShrinkBackwardLaunch, p: Problem) -> list[Launch]:
    """Every column block reads ds, every rank block reads x."""
    cols, count, ranks = launch.grid
    x, ds, dA = p.M * p.K * _size(p), _low(p, p.M), p.r * p.K * _adapter(p)
    seed = _SEED if launch.dropout else 0
    partials = _partials(count, p.r * p.K)
    return [
        Launch(
            x + ds + seed + partials,
            dA + partials,
            ranks * x + cols * ds + cols * count * ranks * seed + partials,
            dA + partials,
        )
    ]


@traffic_of.register
def _lora_linear(launch: LoraLinearLaunch, p: Problem) -> list[Launch]:
    """The tiles, and a shrink of each row block."""
    tiles = _tiles(launch.gemm, p)
    x, s, A = p.M * p.K * _size(p), _low(p, p.M), p.r * p.K * _adapter(p)
    rows = _blocks(p.M, launch.gemm.config.block_m)
    written = tiles.written + s
    return [Launch(tiles.read + A, written, tiles.loaded + x + rows * A, written, x)]


@traffic_of.register
def _weight_norm(launch: WeightNormLaunch, p: Problem) -> list[Launch]:
    """Every program reads A, and its rows of W and B: of more than two rank blocks those of B for each
    block of K. ``scaling`` is a number, which no program loads."""
    W, A, B = p.N * p.K * _size(p), p.r * p.K * _adapter(p), p.N * p.r * _adapter(p)
    norm = p.N * _NUMBER
    times = _blocks(p.K, launch.config.block_k) if launch.rank_blocks > 2 else 1
    return [Launch(W + A + B, norm, W + launch.programs * A + times * B, norm)]


@traffic_of.register
def _bottleneck(launch: BottleneckLaunch, p: Problem) -> list[Launch]:
    """Every program goes through h and D of its rows, and through U of its column group; h is counted
    once in what is read, though L2 may not have all of it the second time."""
    rows, groups = launch.grid
    h, y, a = p.M * p.K * _size(p), p.M * p.N * _size(p), launch.keeps * _low(p, p.M)
    D, U = p.r * p.K * _adapter(p), p.r * p.N * _adapter(p)
    if p.bias:
        D, U = D + p.r * _adapter(p), U + p.N * _adapter(p)
    read = h + D + U + (y if p.residual else 0)
    return [Launch(read, y + a, groups * (h + rows * D) + rows * U + y, y + a)]


@traffic_of.register
def _bottleneck_backward(launch: BottleneckBackwardLaunch, p: Problem) -> list[Launch]:
    """The pass over rows as a forward's, which leaves dd in a partial sum of each row block."""
    found, wants, a = [], {*p.wants}, _low(p, p.M)
    later = {*launch.columns.wants} if launch.columns is not None else set()
    if launch.rows is not None:
        rows, groups = launch.rows.grid
        dy, dh, of_da = p.M * p.N * _size(p), p.M * p.K * _size(p), wants & {"dh", "dD", "dd"}
        read, U, D = (dy, p.r * p.N * _adapter(p), 0) if of_da else (0, 0, 0)
        written = a * (("dU" in later) + bool(later & {"dD", "dh"}))
        again, partials, times = 0, 0, groups
        if launch.rows.split:
            partials, times = _partials(groups, p.M * p.r), 1
            written += partials
        if "dh" in wants - later:
            D, written, again = p.r * p.K * _adapter(p), written + dh, 0 if p.residual else dy
        if "dd" in wants:
            sums = rows * p.r * _PARTIAL
            partials, written = partials + sums, written + sums + p.r * _adapter(p)
        loaded = times * (read + rows * U + a) + rows * D + again + partials
        found.append(Launch(read + U + a + D + partials, written, loaded, written))
    if launch.columns is not None:
        found.append(_bottleneck_columns(launch.columns, p))
    return found


def _bottleneck_columns(launch: ColumnsLaunch, p: Problem) -> Launch:
    """Every column block reads z or da of its rows, and da again for dh; every row group reads D then,
    and every rank block dy and h."""
    _, groups, ranks = launch.grid
    wants, low, of_dy, of_h = {*launch.wants}, _low(p, p.M), 0, 0
    if launch.of_dy:
        of_dy = _blocks(p.N, launch.config.block_k)
    if "dD" in wants:
        of_h = _blocks(p.K, launch.config.block_k)
    matrices = (launch.of_dy * p.N + ("dD" in wants) * p.K) * p.M * _size(p)
    sums = sum(
        size
        for name, size in {"dU": p.N * p.r, "du": p.N, "dD": p.r * p.K}.items()
        if name in wants
    )
    partials = _partials(groups, sums)
    read = matrices + low * (("dU" in wants) + bool(wants & {"dD", "dh"})) + partials
    loaded = ranks * matrices + partials + low * (of_dy * ("dU" in wants) + of_h)
    written = sums * _adapter(p) + partials
    if "dh" in wants:
        D = p.r * p.K * _adapter(p)
        read, written = read + D, written + p.M * p.K * _size(p)
        loaded += groups * D + low * of_dy
    return Launch(read, written, loaded, written)


def dequantization(weight: Weight, W: torch.Tensor) -> Launch:
    """Every program reads its own codes, and for each of them a number of the 16 where they are of 4
    bits. A group's scale is loaded once, an element's where a group may have several; nested, with its
    number, its factor and the offset."""
    programs = _blocks(W.numel(), GROUPS * PER_GROUP)
    stored = sum(tensor.nbytes for tensor in operands.stored(weight))
    if isinstance(weight, EightBit):
        loaded = W.numel() + _scales_loaded(weight, W, programs)
        return Launch(stored, W.nbytes, loaded, W.nbytes)
    assert isinstance(weight, FourBit | MXFP4)
    lanes = programs * GROUPS * PER_GROUP
    loaded = _blocks(W.numel(), 2) + _NUMBER * lanes + _scales_loaded(weight, W, programs)
    return Launch(stored + _NUMBERS, W.nbytes, loaded, W.nbytes)


def _scales_loaded(weight: FourBit | EightBit | MXFP4, W: torch.Tensor, programs: int) -> int:
    groups, K = _blocks(W.numel(), PER_GROUP), W.shape[1]
    if isinstance(weight, MXFP4):
        return groups
    if isinstance(weight, EightBit):
        if weight.block is None and weight.scale.numel() == 1:
            return programs * _NUMBER
        alike = K % PER_GROUP == 0 and (weight.block is None or weight.block[1] % PER_GROUP == 0)
        return _NUMBER * (groups if alike else W.numel())
    alike = weight.block % PER_GROUP == 0
    inside = groups if alike else W.numel()
    if weight.nested_block is None:
        return _NUMBER * inside
    lanes = programs * GROUPS * (1 if alike else PER_GROUP)
    return inside + _NUMBER * (lanes + inside + programs)


def codes_product(launch: CodesLaunch, p: Problem, weight: Weight) -> Launch:
    """Every column block reads x, every row block reads W's codes, B and the bias. The last program of a
    tile reads s and the partial sums."""
    x, s, y = launch.M * launch.K * _size(p), _low(p, launch.M), launch.M * launch.N * _size(p)
    by_cols = launch.N * p.r * _adapter(p) + (launch.N * _size(p) if launch.bias else 0)
    partials = _partials(launch.splits, launch.M * launch.N)
    apart = launch.transposed and launch.folds
    stored, loaded = _codes(launch, p, weight, launch.transposed, apart)
    return Launch(
        x + s + stored + by_cols + partials,
        y + partials,
        _tiles_of_w(launch)[0] * (x + s) + launch.row_blocks * (loaded + by_cols) + partials,
        y + partials,
    )


def codes_decoding(launch: DecodeLaunch, p: Problem, weight: Weight) -> Launch:
    """A layer's forward of few rows over codes."""
    return _decoding(launch, p, *_codes(launch, p, weight, False, False))


def _codes(
    launch: CodesLaunch | DecodeLaunch, p: Problem, weight: Weight, transposed: bool, folds: bool
) -> tuple[int, int]:
    """Bytes of W as it is stored, and what one block of rows loads of it: codes, and of groups of
    neighbours with one scale each reads that. Scales that are left out of the main loop are read for
    each column of y, or folded into dy for each row of W in every tile.

    Numbers that codes of 4 bits stand for are exchanged between threads, each of which has loaded one:
    that is left out, as flags are. The interpreter looks each of them up: ``looked_up``.
    """
    assert isinstance(weight, FourBit | EightBit)
    cols, calls = _tiles_of_w(launch)
    elements = launch.K * launch.N
    groups = elements // launch.group
    stored = sum(tensor.nbytes for tensor in operands.stored(weight))
    if isinstance(weight, EightBit):
        by_rows = weight.scale.numel() > 1
        name = str(weight.stored_dtype).removeprefix("torch.")
        apart = weight.block is None and scales_apart((int(by_rows), 0), name, p.dtype)
        if not apart or (by_rows and transposed and not folds):
            return stored, elements + _NUMBER * groups
        scales = cols * launch.K if by_rows and transposed else launch.N
        return stored, elements + _NUMBER * scales
    loaded = elements // 2 + _NUMBER * groups
    if weight.nested_block is not None:
        # A code and a factor each group, a number each lane of a tile, the offset each tile.
        lanes = launch.config.block_n * launch.config.block_k // launch.group
        loaded += groups + calls * _NUMBER * (lanes + 1)
    return stored + _NUMBERS, loaded


def looked_up(launch: CodesLaunch | DecodeLaunch, weight: Weight) -> int:
    """Bytes of the numbers that the interpreter looks up in a product over codes, one each code."""
    if isinstance(weight, EightBit):
        return 0
    rows = 1 if isinstance(launch, DecodeLaunch) else launch.row_blocks
    calls = _tiles_of_w(launch)[1]
    return rows * calls * launch.config.block_n * launch.config.block_k * _NUMBER


def _tiles_of_w(launch: CodesLaunch | DecodeLaunch) -> tuple[int, int]:
    """Column blocks of y, and tiles of W that a row block reads."""
    c = launch.config
    cols = _blocks(launch.N, c.block_n)
    return cols, cols * _blocks(launch.K, c.block_k)


def _size(p: Problem) -> int:
    """Of an element of the activations."""
    return p.dtype.itemsize


def _adapter(p: Problem) -> int:
    return p.adapter_dtype.itemsize


def _low(p: Problem, rows: int) -> int:
    """Bytes of so many rows of s or ds."""
    return rows * p.r * wide(p.dtype).itemsize


def _partials(count: int, size: int) -> int:
    """Bytes of the partial sums of ``size`` elements; one is none."""
    return count * size * _PARTIAL if count > 1 else 0


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


class _Counted(Triton):
    """Plans as on a GPU, launches nothing, notes what would move; results are as empty as meta is."""

    def __init__(self, note: Callable[[list[Launch]], None]) -> None:
        super().__init__()
        self._note = note

    def why_unusable(self) -> str | None:
        return None

    def plan(self, problem: Problem) -> Plan | Refusal:
        M, K, N, dtype = problem.M, problem.K, problem.N, problem.dtype
        contiguous = Layouts(
            Layout.fresh(M, K, dtype), Layout.fresh(M, N, dtype), Layout.fresh(N, K, dtype)
        )
        return super().plan(problem._replace(layouts=contiguous))

    def dequantize(self, weight: Weight, W: torch.Tensor) -> None:
        self._note([dequantization(weight, W)])

    def run_of(self, launch: Planned, problem: Problem) -> Run:
        if isinstance(launch, CodesLaunch) or (isinstance(launch, DecodeLaunch) and launch.group):
            return self._over_codes(launch, problem)
        moved = traffic_of(launch, problem)

        def run(first: torch.Tensor, *_: Any) -> Any:
            self._note(moved)
            return _results(problem, first)

        return run

    def _over_codes(self, launch: CodesLaunch | DecodeLaunch, problem: Problem) -> Run:
        """How many scales there are, the weight alone knows."""

        def run(x: torch.Tensor, weight: Weight, *_: Any) -> Any:
            if isinstance(launch, DecodeLaunch):
                self._note([codes_decoding(launch, problem, weight)])
            else:
                self._note([codes_product(launch, problem, weight)])
            return _results(problem, x)

        return run


@traffic_of.register
def _scaled_linear(launch: ScaledLinearLaunch, p: Problem) -> list[Launch]:
    """The GEMM, ours or PyTorch's, the pass, and where there are partial sums the launch that adds them
    up; W is read by the GEMM alone."""
    rows, gemm = launch.rows, launch.gemm
    of_rows = [] if rows is None else [_scaled_pass(rows, p)]
    if rows is not None and rows.sums:
        of_rows.append(_added_up(rows.grid[1], rows.N, p))
    if gemm is not None:
        sums = [_added_up(gemm.row_blocks, gemm.gemm.N, p)] if gemm.sums else []
        return [*of_rows, _scaled_gemm(gemm, p), *sums]
    if p.operation == "scaled_linear_backward" and not p.scales_input and "dx" not in p.wants:
        return of_rows
    x, W, y = (size * _size(p) for size in (p.M * p.K, p.N * p.K, p.M * p.N))
    read, written = (y, x) if p.transposed else (x, y)
    read += W + (p.N * _size(p) if p.bias else 0)
    return [*of_rows, Launch(read, written, 0, 0, by_pytorch=True)]


def _added_up(count: int, N: int, p: Problem) -> Launch:
    """Partial sums ``[count, N]``."""
    sums, dscale = count * N * _PARTIAL, N * _adapter(p)
    return Launch(sums, dscale, sums, dscale)


def _scaled_gemm(launch: ScaledGemmLaunch, p: Problem) -> Launch:
    """Tiles without ranks. At a load the vector is read for every tile, else for every row block."""
    gemm, tiles = launch.gemm, _tiles(launch.gemm, p._replace(r=0))
    rows, cols = _blocks(gemm.M, gemm.config.block_m), _blocks(gemm.N, gemm.config.block_n)
    of_y, partials = gemm.M * gemm.N * _size(p), _partials(gemm.splits, gemm.M * gemm.N)
    scale = kept = 0
    loaded = tiles.loaded + partials
    if launch.at_load:
        scale = gemm.K * _adapter(p)
        loaded += rows * cols * scale
    elif launch.writes:
        scale = gemm.N * _adapter(p)
        loaded += rows * scale
    if launch.sums:
        kept = of_y
    written = of_y * (launch.writes + launch.keeps) + partials
    written += rows * gemm.N * _PARTIAL if launch.sums else 0
    return Launch(tiles.read + scale + kept + partials, written, loaded + kept, written)


def _scaled_pass(launch: ScaledPassLaunch, p: Problem) -> Launch:
    """Every row group reads the vector where the scaled matrix is asked for."""
    matrix, groups = launch.M * launch.N * _size(p), launch.grid[1]
    scale = launch.N * _adapter(p) if launch.writes else 0
    read = matrix * (1 + launch.sums)
    written = matrix * launch.writes + (groups * launch.N * _PARTIAL if launch.sums else 0)
    return Launch(read + scale, written, read + groups * scale, written)


def _results(p: Problem, like: torch.Tensor) -> Any:
    def empty(*size: int, dtype: torch.dtype = p.dtype) -> torch.Tensor:
        return like.new_empty(size, dtype=dtype)

    low, adapter = wide(p.dtype), p.adapter_dtype
    made: dict[str, Callable[[], torch.Tensor]] = {
        "y": lambda: empty(p.M, p.N),
        "s": lambda: empty(p.M, p.r, dtype=low),
        "dx": lambda: empty(p.M, p.K),
        "ds": lambda: empty(p.M, p.r, dtype=low),
        "dA": lambda: empty(p.r, p.K, dtype=adapter),
        "dB": lambda: empty(p.N, p.r, dtype=adapter),
        "dbias": lambda: empty(p.N),
        "norm": lambda: empty(p.N, dtype=torch.float32),
    }
    if p.operation == "lora_linear":
        return made["y"](), made["s"]()
    if p.operation == "bottleneck":  # whose a is s, whose D is A and whose U is B
        return made["y"](), made["s"]() if "a" in p.wants else None
    if p.operation == "bottleneck_backward":
        sizes = {
            "dh": (p.M, p.K), "dD": (p.r, p.K), "dd": (p.r,), "dU": (p.N, p.r), "du": (p.N,),
        }  # fmt: skip
        return tuple(
            empty(*size, dtype=p.dtype if name == "dh" else adapter) if name in p.wants else None
            for name, size in sizes.items()
        )
    if p.operation == "scaled_linear":
        return made["y"](), made["y"]() if "z" in p.wants else None
    if p.operation == "scaled_linear_backward":
        dscale = empty(p.K if p.scales_input else p.N, dtype=adapter)
        dx = made["dx"]() if "dx" in p.wants else None
        return dx, dscale if "dscale" in p.wants else None
    if p.operation == "expand_backward":
        return tuple(made[name]() if name in p.wants else None for name in ("ds", "dB", "dbias"))
    product = "dx" if p.transposed else "y"
    only = {
        "shrink": "s", "expand": "y", "shrink_backward": "dA", "linear_expand": product,
        WEIGHT_NORM: "norm",
    }  # fmt: skip
    return made[only[p.operation]]()


@contextlib.contextmanager
def standing_in(sms: int, note: Callable[[list[Launch]], None]) -> Iterator[None]:
    """Within the block Triton's backend launches nothing, runs on any device, and is counted; what is
    chosen automatically is that on an H200 on which nothing was tuned."""
    with cost.pretending(h200(sms)), registry.standing_in(_Counted(note)):
        yield
