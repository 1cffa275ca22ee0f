"""When the programs of a layer's forward end, by the cycles of its items and tiles.

    python -m ptx.schedule             (with tests/ and tests/kernels on PYTHONPATH)

Who does what is exact: the kernel's own functions say it. How long an item of the helpers and a tile
take is given, the same on every SM. Launches, and the first and last steps of a program, take no time.
"""

import heapq
import sys
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import Any

from lorafast.kernels.common import plan
from lorafast.kernels.common.configs import GROUP_M
from lorafast.kernels.linear_expand import tile
from lorafast.kernels.lora_linear import helpers as shares

_LANGUAGE = SimpleNamespace(
    cdiv=lambda a, b: -(-a // b), maximum=max, minimum=min,
    where=lambda condition, yes, no: yes if condition else no,
)  # fmt: skip


def _plain(module: Any, name: str) -> Any:
    """A function of a kernel, of integers."""
    known = {"tl": _LANGUAGE}
    if name != "place_of" and hasattr(module, "place_of"):
        known["place_of"] = _plain(module, "place_of")
    return FunctionType(getattr(module, name).fn.__code__, known)


tile_count, tile_of = (_plain(shares, name) for name in ("tile_count", "tile_of"))
tile_at = _plain(tile, "tile_at")


@dataclass(frozen=True)
class Schedule:
    """By ticket: when a program ends, its items, its tiles; and how long programs waited together."""

    ends: tuple[float, ...]
    items: tuple[int, ...]
    tiles: tuple[int, ...]
    waited: float

    @property
    def end(self) -> float:
        """Of the launch."""
        return max(self.ends)


def schedule(
    row_blocks: int,
    col_blocks: int,
    programs: int,
    *,
    tile: float = 1.0,
    item: float = 0.0,
    helpers: int = 0,
    waves: int = 0,
    resident: int | None = None,
    order: Any = tile_of,
    count: Any = tile_count,
) -> Schedule:
    """Of ``programs`` CTAs, of which ``resident`` run at once, the others as these end; by default all.

    ``tile``, ``item``: how long they take; ``order``, ``count``: instead of the kernel's ``tile_of`` and
    ``tile_count``.
    """
    resident = min(resident or programs, programs)
    tiles = row_blocks * col_blocks
    items, ready = [0] * programs, [0.0] * row_blocks
    # Who helps takes items until the queue is empty, and ends only after that.
    free = [(0.0, ticket) for ticket in range(min(resident, helpers))]
    for row_block in range(row_blocks if helpers else 0):
        at, ticket = heapq.heappop(free)
        ready[row_block] = at + item
        items[ticket] += 1
        heapq.heappush(free, (at + item, ticket))
    begins = dict.fromkeys(range(resident), 0.0) | {ticket: at for at, ticket in free}
    running = [(at, ticket) for ticket, at in begins.items()]
    heapq.heapify(running)
    ends, done, waited, started = [0.0] * programs, [0] * programs, 0.0, resident
    while running:
        at, ticket = heapq.heappop(running)
        first = waves if ticket < helpers else 0
        for turn in range(first, count(ticket, programs, tiles, waves, helpers)):
            number = order(turn, ticket, programs, waves, helpers)
            row_block, _ = tile_at(number, row_blocks, col_blocks, 1, 1, GROUP_M)
            waited += max(ready[row_block] - (at + tile), 0.0)
            at = max(at + tile, ready[row_block])
            done[ticket] += 1
        ends[ticket] = at
        if started < programs:
            heapq.heappush(running, (at, started))
            started += 1
    assert (sum(done), sum(items)) == (tiles, row_blocks if helpers else 0)
    return Schedule(tuple(ends), tuple(items), tuple(done), waited)


def lowest_first(turn: int, program: int, programs: int, waves: int, helpers: int) -> int:
    """Late tiles by ticket, the other order: helpers, whose tickets are the lowest, come first."""
    if turn < waves:
        return turn * (programs - helpers) + program - helpers
    return waves * (programs - helpers) + (turn - waves) * programs + program


def lowest_first_count(program: int, programs: int, tiles: int, waves: int, helpers: int) -> int:
    """Its rounds."""
    late = tiles - waves * (programs - helpers)
    return waves + max(-(-(late - program) // programs), 0)


LOWEST_FIRST: dict[str, Any] = {"order": lowest_first, "count": lowest_first_count}
SMS, BESIDE = 132, 116
"""Of an H100, and those that a communication kernel on 16 of them leaves."""
SHAPES = (
    (8192, 4096, 4096, (8, 16)), (8192, 4096, 14336, (8,)), (4096, 4096, 4096, (8,)),
    (16384, 4096, 1024, (32, 64)), (8192, 4096, 1024, (8, 32, 64)),
)  # fmt: skip
"""M, K, N, and numbers of helpers."""


def main() -> int:
    """Prints when launches end, in rounds of tiles; both orders, for items as the counts bound them and
    as they are planned."""
    from .counts import count_helped

    tile, item = (max(row.cycles.values()) for row in count_helped(90, 8192, 4096, 4096, 16))
    size, block_m, block_n = 2, 128, 256
    planned = plan.item_rounds(block_n, size) * tile
    print(f"cycles at least: a tile {tile:,.0f}, an item {item:,.0f}; planned {planned:,.0f}")
    for M, K, N, numbers in SHAPES:
        rows, cols = M // block_m, N // block_n
        print(f"{M} x {K} -> {N}: {rows * cols} tiles, alone {schedule(rows, cols, SMS).end:.0f}")
        for helpers in numbers:
            for waves in range(min(5, -(-rows * cols // SMS)) + 1):
                ends = [
                    schedule(
                        rows, cols, SMS, tile=tile, item=of, helpers=helpers, waves=waves, **order
                    ).end / tile
                    for of in (item, planned) for order in ({}, LOWEST_FIRST)
                ]  # fmt: skip
                said = " ".join(f"{end:.2f}" for end in ends)
                print(f"    {helpers} helpers, {waves} rounds missed: {said}")
        for programs in (SMS, BESIDE):
            end = schedule(rows, cols, programs, resident=BESIDE).end
            print(f"    {programs} programs on {BESIDE} SMs, no helpers: {end:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
