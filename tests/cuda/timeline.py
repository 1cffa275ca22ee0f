"""When the warps of a CTA of csrc/cuda/sm90.cuh multiply and when they don't: a model, no measurement.

A role of the kernel is a generator that waits and arrives as the kernel's text has it. How many
instructions it issues is counted by executing the PTX (``ptx.sm90_counts``); how long an instruction, a
copy or a barrier takes is assumed (``Assumed``). Tensor cores and the SM's share of L2 are each a
queue. What comes out: clocks of a tile, and for those in which tensor cores have nothing, what the
consumer that multiplies next was doing.
"""

import bisect
import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

Role = Generator[Any, Any, None]
PATIENT = 16
"""K blocks of a tile, from which on its mask isn't made while the last tile is stored."""
_CHUNK = 32
"""Instructions after which a warp looks again how many others issue."""


@dataclass(frozen=True)
class Assumed:
    """Clocks, none of them measured here.

    ``instruction``: from one instruction of a warp to its next, alone; ptxas' own stalls say 2
    (``sass``). ``l2``: bytes an SM gets in a clock. ``copy``: from TMA's start to its first bytes;
    ``load``: of a global load, there and back. ``products``: from the last product to the warp that
    waits for it. ``wake``, ``meet``, ``fence``: an mbarrier's waiter goes on, a named barrier, a
    proxy fence. ``store``: until TMA has read a box of y. ``in_turn``: products of the two
    warpgroups alternate; else groups do.
    """

    instruction: float = 2.0
    l2: float = 64.0
    copy: float = 700.0
    load: float = 500.0
    products: float = 60.0
    wake: float = 20.0
    meet: float = 30.0
    fence: float = 40.0
    store: float = 500.0
    in_turn: bool = True


@dataclass(frozen=True)
class Tile:
    """What a tile is made of. Instructions are those of a warp.

    ``step``, ``begin``, ``rank``, ``piece``: of a consumer, for a K block, before the first one, for
    a rank step, a piece of y. ``mask``: for what is added of a rank step under a mask, 0 without
    one. ``load``: of the loading thread, a K block. ``write``: of a writer, a rank step; ``trips``:
    loads of it one after another; ``bits``: the mask of a tile. ``products``: clocks of a product of
    one warpgroup.
    """

    k_steps: int
    rank_steps: int
    bytes: float
    """Of L2, a K block."""
    stages: int = 4
    products: float = 128.0
    substeps: int = 1
    step: float = 53.0
    begin: float = 110.0
    rank: float = 60.0
    piece: float = 86.0
    pieces: int = 4
    mask: float = 0.0
    bits: float = 0.0
    load: float = 23.0
    write: float = 550.0
    begin_write: float = 55.0
    trips: float = 9.0
    skew: int = 0
    """K blocks that the first warpgroup has begun before the second begins its first tile."""
    slots: int = 2
    """Pieces of y in shared memory, of a warpgroup."""


@dataclass
class Barrier:
    """An mbarrier."""

    arrivals: int
    phase: int = 0
    come: int = 0
    waiters: list[tuple[int, Callable[[], None]]] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """``tile``: clocks of a tile between others; ``busy``: tensor cores' of them. ``idle``: theirs
    by cause. ``first``, ``last``: clocks before the first product, and after the last."""

    tile: float
    busy: float
    idle: dict[str, float]
    first: float
    last: float

    @property
    def bound(self) -> float:
        """The share of a tile in which tensor cores multiply."""
        return self.busy / self.tile


class Cta:
    """A CTA that goes through so many tiles."""

    def __init__(self, tile: Tile, assumed: Assumed, tiles: int) -> None:
        self.tile, self.assumed, self.tiles = tile, assumed, tiles
        self.now, self.order = 0.0, itertools.count()
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        n = tile.stages
        self.full = [Barrier(1) for _ in range(n)]
        self.empty = [Barrier(2) for _ in range(n)]
        self.granted = [Barrier(1) for _ in range(n)]
        self.posted = [Barrier(1) for _ in range(2)]
        self.taken = [Barrier(3) for _ in range(2)]
        self.ahead = Barrier(1)
        self.stored = Barrier(2)
        self.issuing = 0
        self.l2_free = 0.0
        self.queues: tuple[deque[tuple[float, Callable[[], None] | None]], ...] = (deque(), deque())
        self.turn, self.in_group, self.running = 0, False, False
        self.spans: list[tuple[float, float, int]] = []
        self.doing: tuple[list[tuple[float, str]], ...] = ([], [])
        self.ends: tuple[list[float], ...] = ([], [])

    # What a role may ask for

    def later(self, clocks: float, do: Callable[[], None]) -> None:
        heapq.heappush(self.heap, (self.now + clocks, next(self.order), do))

    def start(self, role: Role) -> None:
        def go() -> None:
            asked = next(role, None)
            if asked is not None:
                asked(go)

        self.later(0.0, go)

    def pause(self, clocks: float) -> Any:
        return lambda go: self.later(clocks, go)

    def issue(self, instructions: float) -> Role:
        """Of a warp on a scheduler with the others' warps of the same quarter."""
        self.issuing += 1
        left = instructions
        while left > 0:
            some = min(left, _CHUNK)
            yield self.pause(some * max(self.assumed.instruction, self.issuing))
            left -= some
        self.issuing -= 1

    def wait(self, barrier: Barrier, parity: int) -> Any:
        def ask(go: Callable[[], None]) -> None:
            if barrier.phase & 1 != parity:
                self.later(0.0, go)
            else:
                barrier.waiters.append((parity, go))

        return ask

    def arrive(self, barrier: Barrier) -> None:
        barrier.come += 1
        if barrier.come == barrier.arrivals:
            barrier.phase, barrier.come = barrier.phase + 1, 0
            for _, go in barrier.waiters:
                self.later(self.assumed.wake, go)
            barrier.waiters.clear()

    # Tensor cores

    def multiply(self, half: int, count: int, clocks: float, then: Callable[[], None]) -> None:
        for i in range(count):
            self.queues[half].append((clocks, then if i == count - 1 else None))
        if not self.running:
            self.next_product()

    def next_product(self) -> None:
        if not self.in_group and self.queues[1 - self.turn]:
            self.turn = 1 - self.turn
        if not self.queues[self.turn]:
            self.turn = 1 - self.turn
        self.running = bool(self.queues[self.turn])
        if not self.running:
            self.in_group = False
            return
        clocks, then = self.queues[self.turn].popleft()
        self.in_group = then is None and not self.assumed.in_turn
        self.spans.append((self.now, self.now + clocks, self.turn))

        def done() -> None:
            if then is not None:
                then()
            self.next_product()

        self.later(clocks, done)

    # The roles

    def loader(self) -> Role:
        t, at = self.tile, itertools.count()
        for n in range(self.tiles):
            yield self.wait(self.taken[n % 2], (n // 2 & 1) ^ 1)
            self.arrive(self.posted[n % 2])
            for step in range(t.k_steps + t.rank_steps + (t.mask > 0)):
                i, turn = (j := next(at)) % t.stages, j // t.stages & 1
                yield self.wait(self.empty[i], turn ^ 1)
                if step >= t.k_steps:
                    self.arrive(self.granted[i])
                    continue
                yield from self.issue(t.load)
                begun = max(self.now, self.l2_free)
                self.l2_free = begun + t.bytes / self.assumed.l2
                ends = self.l2_free - self.now + self.assumed.copy
                self.later(ends, lambda i=i: self.arrive(self.full[i]))

    def writer(self) -> Role:
        t, a, at, grants = self.tile, self.assumed, 0, [0] * self.tile.stages
        for n in range(self.tiles):
            yield self.wait(self.posted[n % 2], n // 2 & 1)
            yield from self.issue(t.begin_write)
            at += t.k_steps
            if t.mask:
                if t.k_steps >= PATIENT:
                    yield self.wait(self.stored, n & 1)
                yield self.pause(a.load)
                yield from self.issue(t.bits)
            for step in range(t.rank_steps + (t.mask > 0)):
                i = at % t.stages
                yield self.wait(self.granted[i], grants[i])
                grants[i] ^= 1
                if step or not t.mask:
                    yield from self.issue(t.write)
                    yield self.pause(t.trips * a.load)
                yield self.pause(a.fence + a.meet)
                self.arrive(self.full[i])
                at += 1
            self.arrive(self.taken[n % 2])

    def consumer(self, half: int) -> Role:
        t, a, at = self.tile, self.assumed, 0
        done = [0, 0]  # groups begun, and over
        sleeper: list[Callable[[], None]] = []
        held: list[Barrier] = []

        def says(what: str) -> None:
            self.doing[half].append((self.now, what))

        def over() -> None:
            def see() -> None:
                done[1] += 1
                if sleeper:
                    sleeper.pop()()

            self.later(a.products, see)

        def products(left: int) -> Iterator[Any]:
            while done[0] - done[1] > left:
                yield sleeper.append

        def begin(what: str, instructions: float) -> Role:
            nonlocal at
            says(what)
            i = at % t.stages
            yield self.wait(self.full[i], at // t.stages & 1)
            at += 1
            says("begins")
            yield from self.issue(instructions)
            return self.empty[i]

        def multiply(count: int, clocks: float) -> None:
            done[0] += 1
            self.multiply(half, count, clocks, over)

        def steps(ranks: bool) -> Role:
            for _ in range(t.rank_steps if ranks else t.k_steps):
                what = "waits for ranks" if ranks else "waits for loads"
                read = yield from begin(what, t.rank if ranks else t.step / 2)
                multiply(t.substeps if ranks else 4, t.products)
                if not half and done[0] == t.skew:
                    self.arrive(self.ahead)
                says("multiplies")
                yield from products(1)
                yield from release()
                held.append(read)
                if not ranks:
                    yield from self.issue(t.step / 2)

        def masked_ranks() -> Role:
            self.arrive((yield from begin("waits for the mask", t.pieces + 1)))
            yield from drain()
            for _ in range(t.rank_steps):
                held.append((yield from begin("waits for ranks", t.rank)))
                clocks = t.products / t.pieces
                multiply(t.substeps, clocks)
                for piece in range(t.pieces):
                    last = piece == t.pieces - 1
                    if not last:
                        multiply(t.substeps, clocks)
                    says("multiplies ranks")
                    # Products that are many end with the next ones, as ptxas has it.
                    yield from products(1 if t.substeps == 1 and not last else 0)
                    if last:
                        yield from release()
                    says("masks")
                    yield from self.issue(t.mask / t.pieces)

        def release() -> Role:
            while held:
                self.arrive(held.pop())
                yield self.pause(0.0)

        def drain() -> Role:
            says("drains")
            yield from products(0)
            yield from release()

        boxes: list[float] = []
        says("waits for the first tile")
        if half and t.skew:
            yield self.wait(self.ahead, 0)
        for n in range(self.tiles):
            yield self.wait(self.posted[n % 2], n // 2 & 1)
            says("between tiles")
            yield from self.issue(t.begin)
            if t.k_steps >= PATIENT:
                self.arrive(self.stored)
            yield from steps(False)
            yield from masked_ranks() if t.mask else steps(True)
            yield from drain()
            for _ in range(t.pieces):
                says("waits for stores")
                if len(boxes) >= t.slots:
                    yield self.pause(max(0.0, boxes[-t.slots] + a.store - self.now))
                says("stores")
                yield self.pause(a.meet)
                yield from self.issue(t.piece)
                yield self.pause(a.fence + a.meet)
                boxes.append(self.now)
            self.arrive(self.taken[n % 2])
            self.ends[half].append(self.now)

    def run(self) -> None:
        for role in (self.loader(), self.writer(), self.consumer(0), self.consumer(1)):
            self.start(role)
        while self.heap:
            self.now, _, do = heapq.heappop(self.heap)
            do()
        for half, ends in enumerate(self.ends):
            if len(ends) != self.tiles:
                raise RuntimeError(f"warpgroup {half} ends {len(ends)} of {self.tiles} tiles")


def timeline(tile: Tile, assumed: Assumed = Assumed(), tiles: int = 12, after: int = 4) -> Found:
    """Of the tiles after the first ones, which are as far apart as each other."""
    cta = Cta(tile, assumed, tiles)
    cta.run()
    begin, end = cta.ends[0][after - 1], cta.ends[0][-2]
    busy = sum(max(0.0, min(e, end) - max(b, begin)) for b, e, _ in cta.spans)
    idle = Counter[str]()
    for (_, a, _), (b, _, half) in itertools.pairwise(cta.spans):
        if a < b and begin < b and a < end:
            said = cta.doing[half]
            i = max(bisect.bisect_right(said, a, key=lambda one: one[0]) - 1, 0)
            while i < len(said) and said[i][0] < b:
                until = said[i + 1][0] if i + 1 < len(said) else cta.now
                idle[said[i][1]] += max(0.0, min(b, until, end) - max(a, said[i][0], begin))
                i += 1
    count = tiles - 1 - after
    return Found(
        (end - begin) / count, busy / count,
        {what: clocks / count for what, clocks in idle.items() if clocks},
        cta.spans[0][0], cta.now - cta.spans[-1][1],
    )  # fmt: skip
