"""What the kernels of csrc/cuda execute at full size, counted on a part: ``counts``, but for CUDA C++.

A launch of full size is planned, not executed: a part of it is (``cuda_launch``). How the counts F of a
part scale:

- ``shrink``: row blocks share nothing. One of them, with all of its columns, times their number.
- ``shrink_backward``: the same of column blocks.
- ``expand_backward`` of S row groups and G column blocks: groups share the sums of dB, blocks those of
  ds. F(S, G) = S·F(1, G) + G·(D(S) − S·D(1)), where D(S) is F(S, 1) with one tile a CTA. F(1, G) is a
  line of G, in steps of the four parts that are added at a time.
- ``expand`` and ``mask``: CTAs share nothing.
- ``linear_expand``: tiles share nothing. One of them, with all shares of its K, times their number.
- GEMMs of persistent CTAs (``wgmma``): ``sm90_counts``.
- ``lora_linear`` of tiles: the first of a row's CTAs stores s. Rows times (F(1, 1) + those beyond the
  first times (F(1, 2) − F(1, 1))).
- ``lora_linear`` of few rows (decode): helpers make s, as much of it whatever N is; every other CTA has
  the same block of W. F(n) of n blocks is F(n₁) + (n − n₁)·(F(n₂) − F(n₁)) / (n₂ − n₁).

A step of the main loop is the difference of two loops that are longer than the ring, and a long loop is
a short one and steps. Lanes of a warp that have parted meet as soon as they can, in a part as in the
whole. No size here leaves a part of a tile over; one that does is refused.
"""

import itertools
from collections.abc import Callable

from . import sm90_counts
from .counts import DECODED, DECODED_SMALL, LAYERS, RANKS, SMALL, Row, least, what_matters
from .cuda_launch import F16, Subject, Sum, Whole, bare, planned, registers, whole_of, why_no_cuda

__all__ = [
    "WIDE",
    "Subject",
    "Sum",
    "Whole",
    "bare",
    "count",
    "plain",
    "planned",
    "registers",
    "row_of",
    "rows",
    "rows_of",
    "scaled",
    "subjects",
    "whole_of",
    "why_no_cuda",
]  # fmt: skip
WIDE = (8192, 4096, 14336)
"""A layer of a block's MLP."""

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

    def walks(share: int, missing: int = 0) -> Sum:
        """Of one block across; the last share lacks so many steps."""
        size = {along: (share * shares - missing) * of[along], across: of[across]}
        return whole.part(**size, share=share)

    share, missing = n["share"], n["share"] * shares - steps
    one, step = _loop(share, n["stages"], walks)
    step = step.times(1 / (shares * ranks))
    # A last share that is shorter than the ring may enter the loop by another branch.
    last, short = share - missing, min(share, n["stages"] + 1)
    if last < short:
        one = one.plus(walks(short, short - last)).plus(walks(short), -1)
        missing = share - short
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


def _onto_from_memory(subject: Subject) -> float:
    """Where y is read too; 0 elsewhere, where operands and results are all there is."""
    M, _, N, _ = subject.sizes
    return least(subject.operation, *subject.sizes) + 2.0 * M * N if subject.onto else 0.0


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
    return whole if isinstance(whole, str) else rows_of(whole)[0]


def rows_of(whole: Whole) -> list[Row]:
    """Those of a launch: one, but for persistent CTAs that do two kinds of things."""
    if whole.subject.family == sm90_counts.FAMILY:
        return sm90_counts.rows_of(whole)
    return [row_of(whole)]


def row_of(whole: Whole) -> Row:
    """That of a launch whose CTAs are the tiles."""
    subject, (found, step, steps) = whole.subject, scaled(whole)
    each = steps / whole.ctas
    tile = found.times(1 / whole.ctas).plus(step, -each)
    ahead = 32 * (step["ahead"] or step["copied"] * (whole.n.get("stages", 1) - 1))
    if subject.family == "skinny" and whole.n["stages"] == 1:  # the next tile, in registers
        ahead = 2.0 * whole.n["block_m"] * whole.n["block_n"]
    decoded = subject.family == "decode"
    gemm = subject.family == "linear_expand"
    return Row(
        subject.operation, whole.variant, whole.capability, *subject.sizes,
        step.amounts, tile.amounts, Sum().amounts, each, whole.ctas,
        ahead * whole.ctas_of_an_sm, (subject.operation, subject.family) in _FROM_L2,
        whole.registers, backend="cuda",
        from_memory=_decode_from_memory(whole, found) if decoded else _onto_from_memory(subject),
        stalls=whole.stalls(step["tensor"], whole.threads // 32) if gemm else {},
    )  # fmt: skip


def plain(subject: Subject, capability: int) -> Row:
    """The row of the same ``linear_expand`` with r = 0 and without a mask: a GEMM."""
    whole = whole_of(subject, capability)
    if isinstance(whole, str):
        raise RuntimeError(whole)
    return rows_of(bare(whole))[0]


def subjects(capability: int = 80) -> list[Subject]:
    """Each kernel at the sizes that matter to it, once; of 7.5 those that are served in float16."""
    if capability < _BFLOAT16:
        return _in_float16()
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
        Subject("linear_expand", family, (*layer, r), dropout, variant)
        for family in ("linear_expand", sm90_counts.FAMILY)
        for layer in (*LAYERS, WIDE) for r in RANKS
        for variant, dropout in (("forward", False), ("dx", False), ("dx", True))
    ]  # fmt: skip
    layers = [
        Subject("lora_linear", sm90_counts.FAMILY, (*layer, r), variant="tile")
        for layer in (*LAYERS, WIDE) for r in RANKS
    ]  # fmt: skip
    mask = Subject("mask", "mask", (8192, 4096, 0, 0))
    return [*found.values(), *small, *decoded, *fused, *layers, mask]


_BFLOAT16 = 80


def _in_float16() -> list[Subject]:
    found = {}
    for r, (M, K, N) in itertools.product(RANKS, LAYERS):
        for operation, family, variant, dropout in (
            ("shrink", "skinny", "", False), ("shrink", "skinny", "", True),
            ("expand", "small", "", False), ("expand", "small", "", True),
            ("expand", "small", "onto", False), ("expand", "small", "onto", True),
            ("expand_backward", "skinny", "", False),
            ("shrink_backward", "skinny", "", False), ("shrink_backward", "skinny", "", True),
        ):  # fmt: skip
            if operation == "expand_backward" and r > 16:
                continue  # two launches: it is planned as a shrink and a shrink_backward
            key = operation, variant, dropout, what_matters(operation, M, K, N, r)
            sizes = (M, K, N, r)
            found.setdefault(key, Subject(operation, family, sizes, dropout, variant, F16))
    return list(found.values())


def rows(capability: int) -> list[Row]:
    """Of every kernel that serves a size; of a GEMM with a low-rank term also without it."""
    found: dict[tuple[object, ...], Row] = {}
    for subject in subjects(capability):
        whole = whole_of(subject, capability)
        if isinstance(whole, str):
            continue
        of = rows_of(whole)
        if subject.operation == "linear_expand" and not subject.dropout:
            of += rows_of(bare(whole))
        for row in of:
            key = row.operation, row.variant, row.M, row.K, row.N, row.r
            found.setdefault(key, row)
    return list(found.values())
