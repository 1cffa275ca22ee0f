"""Counts of the GEMMs of csrc/cuda/sm90.cuh, and the timeline of their tiles that follows from them.

Persistent CTAs take tiles from a queue, as Triton's programs do: F(n, k), of one CTA with n tiles
of k steps, is program + n · (tile + k · step). ``lora_linear`` has a row more: an item of its
helpers, a row block of s. With clusters a part has a cluster where it has a CTA, and counts are
those of one of its CTAs.
"""

import dataclasses
import functools
from dataclasses import dataclass

from timeline import Assumed, Tile, timeline

from .counts import Row
from .cuda_launch import Sum, Whole, bare, undropped, whole_of

ROWS, BLOCK, RANKS_OF_A_STEP = 128, 64, 64
STAGES = {256: 4, 128: 6}
"""Of the ring, by the columns of a tile."""
WRITERS, CONSUMERS = (1, 2, 3), range(4, 12)
"""Warps of a CTA; warp 0 loads."""
_PIECE, _MORE = 64, 2
"""Columns of a piece of y; steps by which a tile that is counted is longer than another."""
FAMILY = "wgmma"
_ASSUMED = Assumed()


@dataclass(frozen=True)
class Parts:
    """What a CTA executes for a step, a tile beside its steps, and beside its tiles; an item of
    helpers."""

    step: Sum
    tile: Sum
    program: Sum
    item_step: Sum = dataclasses.field(default_factory=Sum)
    item: Sum = dataclasses.field(default_factory=Sum)


@functools.cache
def parts(whole: Whole) -> Parts:
    """Of a launch."""
    cluster = whole.n.get("cluster", 1)

    def run(down: int, along: int, steps: int) -> Sum:
        sizes = {"M": down * ROWS * cluster, "N": along * whole.n["columns"], "K": steps * BLOCK}
        helpers = {"helpers": cluster} if "helpers" in whole.n else {}
        return whole.part(**sizes, ctas=cluster, **helpers).times(1 / cluster)

    few = STAGES[whole.n["columns"]] + 1
    one, long = run(1, 1, few), run(1, 1, few + _MORE)
    two, two_long = run(1, 2, few), run(1, 2, few + _MORE)
    step = (two_long - two - (long - one)).times(1 / _MORE)
    tile = (two - one).plus(step, -few)
    if "helpers" not in whole.n:
        return Parts(step, tile, one - (two - one))
    item = run(2, 1, few) - two
    item_step = (long - one).times(1 / _MORE) - step
    return Parts(step, tile, one - (two - one) - item, item_step, item.plus(item_step, -few))


def tile_of(whole: Whole) -> Tile:
    """What the timeline is told of a tile: all of it counted."""
    of, n = parts(whole), whole.n
    masked = any(a.name == "seed" and v is not None for a, v in whole.arguments())
    plain = parts(plain_of(whole))
    ranked = parts(unmasked(whole)) if masked else of
    consumer, stored = of_warps(plain.tile, CONSUMERS), plain.tile["stored"] / len(CONSUMERS)
    writer = of_warps(ranked.tile, WRITERS)
    pieces = n["columns"] // _PIECE
    rank_steps = -(-n["r"] // RANKS_OF_A_STEP)
    per_rank = max(rank_steps, 1)
    return Tile(
        k_steps=n["K"] // BLOCK,
        rank_steps=rank_steps,
        bytes=32 * of.step["copied"],
        stages=STAGES[n["columns"]],
        products=n["columns"] / 2,
        substeps=round(ranked.tile["tensor"] / len(CONSUMERS) / per_rank),
        step=of_warps(of.step, CONSUMERS),
        begin=consumer - stored,
        rank=(of_warps(ranked.tile, CONSUMERS) - consumer) / per_rank,
        piece=stored / pieces,
        pieces=pieces,
        mask=float(whole.schedule.masked) if masked else 0.0,
        bits=of_warps(of.tile, WRITERS) - writer,
        load=of.step["warp 0"],
        write=(writer - of_warps(plain.tile, WRITERS)) / per_rank,
        begin_write=of_warps(plain.tile, WRITERS),
        trips=(ranked.tile["trips"] - plain.tile["trips"]) / per_rank,
    )  # fmt: skip


def unmasked(whole: Whole) -> Whole:
    """The same launch without a mask, whose factors aren't scaled either."""
    given = tuple(1.0 if a.name == "scaling" else v for a, v in whole.arguments())
    return undropped(dataclasses.replace(whole, given=given))


def plain_of(whole: Whole) -> Whole:
    """A launch of the same tiles without a low-rank term: a GEMM."""
    if whole.subject.operation == "linear_expand":
        return bare(whole)
    subject = dataclasses.replace(
        whole.subject, operation="linear_expand", variant="forward", dropout=False
    )
    gemm = whole_of(subject, whole.capability)
    if isinstance(gemm, str):
        raise RuntimeError(gemm)
    given = tuple(whole.n["columns"] if a.name == "columns" else v for a, v in gemm.arguments())
    return bare(dataclasses.replace(gemm, given=given))


def of_warps(of: Sum, warps: range | tuple[int, ...]) -> float:
    """Instructions of one of them, on average."""
    return sum(of[f"warp {w}"] for w in warps) / len(warps)


def rows_of(whole: Whole) -> list[Row]:
    """The row of a tile, and of ``lora_linear`` that of an item."""
    of, subject, n = parts(whole), whole.subject, whole.n
    down, along = -(-n["M"] // ROWS), -(-n["N"] // n["columns"])
    if n["M"] % ROWS or n["N"] % n["columns"] or n["K"] % BLOCK:
        raise RuntimeError(f"{n['M']} x {n['K']} x {n['N']} leaves a part of a tile over")
    steps, stages = n["K"] / BLOCK, STAGES[n["columns"]]
    stalls = whole.stalls(of.step["tensor"], len(CONSUMERS))

    def row(variant: str, step: Sum, tile: Sum, tiles: int, times: dict[str, float]) -> Row:
        return Row(
            subject.operation, variant, whole.capability, *subject.sizes, step.amounts, tile.amounts,
            of.program.amounts, steps, tiles, 32 * step["copied"] * (stages - 1), True,
            whole.registers, backend="cuda", timeline=times,
            stalls=stalls if times else {},
        )  # fmt: skip

    found = [row(whole.variant, of.step, of.tile, down * along, times_of(whole))]
    if "helpers" in n:
        found.append(row("item", of.item_step, of.item, down, {}))
    return found


def times_of(whole: Whole, assumed: Assumed = _ASSUMED) -> dict[str, float]:
    """The timeline of a tile, by name: its clocks, those of tensor cores, those that it takes more
    than the same tile without a low-rank term, and what leaves tensor cores idle."""
    tile = tile_of(whole)
    found = timeline(tile, assumed)
    times = {
        "clocks": found.tile, "tensor": found.busy, "first": found.first, "last": found.last
    } | {f"idle: {cause}": clocks for cause, clocks in found.idle.items()}  # fmt: skip
    if whole.n["r"]:
        times["added"] = found.tile - timeline(without_ranks(tile), assumed).tile
    return times


def without_ranks(tile: Tile) -> Tile:
    """The same tile without its low-rank term."""
    return dataclasses.replace(tile, rank_steps=0, mask=0.0, bits=0.0)
