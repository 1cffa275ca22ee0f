"""The protocol of csrc/cuda/sm90.cuh as a small model, of which every interleaving is gone through.

A role is a generator that yields what it does, as the kernel's text has it; what it gets back are the
numbers that it reads. A state is how far each role has come, and what barriers, stages and mail hold.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Does = tuple[Any, ...]
Role = Iterator[Does]
END = -1
MAIL = 2


class BrokenError(Exception):
    """What is wrong in some interleaving."""


@dataclass(frozen=True)
class Protocol:
    """Sizes, and how the protocol is broken: a name that a role asks for."""

    stages: int = 2
    ctas: int = 1
    tiles: int = 3
    k_steps: int = 2
    rank_steps: int = 1
    consumers: int = 1
    helpers: int = 0
    masked: bool = False
    broken: str = ""

    def steps(self, ranks: bool) -> int:
        """Of a tile's ring."""
        return self.rank_steps if ranks else self.k_steps

    # Roles of a CTA

    def loader(self) -> Role:
        """Takes tiles, loads K blocks, grants rank blocks."""
        at, mail = itertools.count(), itertools.count()

        def post(what: int) -> Role:
            i = next(mail)
            if self.broken != "posts unseen":
                yield "wait", "taken", i % MAIL, (i // MAIL & 1) ^ 1
            yield "post", i % MAIL, i, what
            yield "arrive", "posted", i % MAIL

        def load(ranks: bool, what: int) -> Role:
            for step in range(self.steps(ranks)):
                i = next(at)
                if not (ranks and self.broken == "grants unseen"):
                    yield "wait", "empty", i % self.stages, (i // self.stages & 1) ^ 1
                if ranks:
                    yield "arrive", "granted", i % self.stages
                else:
                    yield "load", i % self.stages, (what, step)

        if self.helpers and (yield ("take", "tickets")) < self.helpers:
            while (item := (yield ("take", "items"))) < self.tiles:
                yield from post(END - 1 - item)
                yield from load(False, END - 1 - item)
        while (tile := (yield ("take", "tiles"))) < self.tiles:
            yield from post(tile)
            for ranks in (self.masked, not self.masked):
                yield from load(ranks, tile)
        yield from post(END)
        if self.broken == "counted by the loader":
            yield ("finish",)

    def writer(self) -> Role:
        """Writes rank blocks, once s is there."""
        at, grants = 0, [0] * self.stages
        for i in itertools.count():
            yield "wait", "posted", i % MAIL, i // MAIL & 1
            tile = yield "mail", i % MAIL, i
            if tile == END:
                break
            if tile >= 0:
                at += 0 if self.masked else self.k_steps
                for step in range(self.rank_steps):
                    stage = at % self.stages
                    if self.broken == "waits for stages alone":
                        yield "wait", "empty", stage, (at // self.stages & 1) ^ 1
                    else:
                        yield "wait", "granted", stage, grants[stage]
                        grants[stage] ^= 1
                    if self.helpers and step == 0:
                        yield "see", tile
                    yield "write", stage, (tile, self.k_steps + step)
                    yield "arrive", "full", stage
                    at += 1
                at += self.k_steps if self.masked else 0
            else:
                at += self.k_steps
            yield "arrive", "taken", i % MAIL
        if self.broken != "counted by the loader":
            yield ("finish",)

    def consumer(self) -> Role:
        """Multiplies, a step behind the last one at the most."""
        at, held = 0, None
        ahead = 1 if self.broken == "releases early" else 0
        for i in itertools.count():
            yield "wait", "posted", i % MAIL, i // MAIL & 1
            tile = yield "mail", i % MAIL, i
            if tile == END:
                return
            kinds = (self.masked, not self.masked) if tile >= 0 else (False,)
            for kind, ranks in enumerate(kinds):
                for step in range(self.steps(ranks)):
                    stage = at % self.stages
                    if self.broken != "reads unseen":
                        yield "wait", "full", stage, at // self.stages & 1
                    yield "read", stage, (tile, step + self.k_steps * ranks)
                    if held is not None:
                        yield from self.release(held, ahead)
                    held, at = stage, at + 1
                if held is not None and (kind == len(kinds) - 1 or (self.masked and ranks)):
                    yield from self.release(held, 0)
                    held = None
            if tile < 0:
                item = END - 1 - tile
                if self.broken == "raises early":
                    yield "raise", item
                    yield "store", item
                else:
                    yield "store", item
                    yield "raise", item
            yield "arrive", "taken", i % MAIL

    def release(self, stage: int, early: int) -> Role:
        """The products of a stage end, then it is given back."""
        both: list[Does] = [("done", stage), ("arrive", "empty", stage)]
        yield from both[::-1] if early else both

    # States

    @property
    def roles(self) -> tuple[str, ...]:
        """Of a CTA."""
        return ("loader", "writer", *["consumer"] * self.consumers)

    @functools.cached_property
    def arrivals(self) -> dict[str, int]:
        """That end a phase."""
        return {
            "full": 1, "empty": self.consumers, "granted": 1, "posted": 1,
            "taken": self.consumers + 1,
        }  # fmt: skip

    def next_of(self, role: str, done: int, got: tuple[int, ...]) -> Does | None:
        """What a role does after so many steps in which it got these numbers; None at its end."""
        key = role, done, got
        if key not in self._known:
            of: Any = getattr(self, role)()
            does, numbers = next(of, None), iter(got)
            for _ in range(done):
                try:
                    does = of.send(next(numbers) if does[0] in GETS else None)
                except StopIteration:
                    does = None
            self._known[key] = does
        return self._known[key]

    @functools.cached_property
    def _known(self) -> dict[Any, Any]:
        return {}


GETS = ("take", "mail")
"""Steps that give a number back."""
AT_ONCE = {
    "wait": ("mail", "read", "write"), "see": ("write",), "mail": (), "post": ("arrive",),
    "write": ("arrive",), "done": ("arrive",), "store": ("raise",),
}  # fmt: skip
"""What a role does in the same step as what is before it. Nothing that others do between the two could
come to another end: a wait that ends begins to read, what is read has ended when its stage is given
back."""
BETWEEN = ("take", "see", "store", "raise", "finish")
"""Steps that others may notice, or wait for. While no role of a CTA is at such a one, whatever others
do can as well come later."""


def check(protocol: Protocol, most: int = 1_000_000) -> int:
    """Goes through every interleaving; how many states there are. Raises ``BrokenError``."""
    start = _State(protocol)
    seen, left = {hash(start.key())}, [start]
    while left:
        state, ends = left.pop(), True
        for after in state.following():
            ends = False
            key = hash(after.key())
            if key not in seen:
                seen.add(key)
                left.append(after)
        if ends:
            state.check_end()
        if len(seen) > most:
            raise RuntimeError(f"more than {most} states")
    return len(seen)


class _State:
    """``threads``: of each role of each CTA, its steps and the numbers that it got. ``cells``: barriers,
    as phases, arrivals and copies under way; stages, as content, reads begun and ended; mail; counters.
    """

    def __init__(self, p: Protocol) -> None:
        self.p = p
        self.threads: list[tuple[int, tuple[int, ...]]] = [(0, ())] * (p.ctas * len(p.roles))
        self.cells: dict[Any, Any] = {}

    def key(self) -> Any:
        return tuple(self.threads), frozenset(self.cells.items())

    def following(self) -> list["_State"]:
        """The states after one step; of one CTA alone if the others' can come later."""
        found = []
        for cta in range(self.p.ctas):
            own, alone = self.following_of(cta)
            if own and alone:
                return own
            found += own
        return found

    def following_of(self, cta: int) -> tuple[list["_State"], bool]:
        """Those of a CTA, and whether no other CTA notices."""
        found, alone = [], True
        for role in range(len(self.p.roles)):
            does = self.next_of(cta, role)
            if does is None:
                continue
            alone = alone and does[0] not in BETWEEN
            after = self.copy()
            if after.step(cta, role):
                found.append(after)
        for at, value in self.cells.items():
            if at[:2] == ("stage", cta) and value[1] == "under way":
                after = self.copy()
                after.arrive_copy(*at[1:])
                found.append(after)
        return found, alone

    def next_of(self, cta: int, role: int) -> Does | None:
        """What a role does next."""
        return self.p.next_of(self.p.roles[role], *self.threads[cta * len(self.p.roles) + role])

    def copy(self) -> "_State":
        """To be changed."""
        of = _State(self.p)
        of.threads, of.cells = list(self.threads), dict(self.cells)
        return of

    def step(self, cta: int, role: int) -> bool:
        """Goes on with a role; False: it waits."""
        thread, before = cta * len(self.p.roles) + role, ""
        while (does := self.next_of(cta, role)) is not None:
            if before and does[0] not in AT_ONCE.get(before, ()):
                return True
            answer = getattr(self, f"do_{does[0]}")(cta, *does[1:])
            if answer is False:
                return bool(before)
            done, got = self.threads[thread]
            self.threads[thread] = done + 1, (*got, answer) if does[0] in GETS else got
            before = does[0]
        return bool(before)

    def check_end(self) -> None:
        for thread in range(len(self.threads)):
            cta, role = divmod(thread, len(self.p.roles))
            does = self.next_of(cta, role)
            if does is not None:
                raise BrokenError(f"CTA {cta}'s {self.p.roles[role]} waits for ever: {does}")
        for at, value in self.cells.items():
            if at[0] == "counter" and value:
                raise BrokenError(f"{at[1:]} stays {value}")

    # Barriers

    def barrier(self, cta: int, name: str, i: int) -> tuple[int, int, int]:
        return self.cells.get(("barrier", cta, name, i), (0, 0, 0))

    def set_barrier(self, cta: int, name: str, i: int, phases: int, come: int, copies: int) -> None:
        if come > self.p.arrivals[name]:
            raise BrokenError(f"{name} {i} gets {come} arrivals")
        if come == self.p.arrivals[name] and copies == 0:
            phases, come = phases + 1, 0
        self.cells["barrier", cta, name, i] = (phases, come, copies)

    def do_wait(self, cta: int, name: str, i: int, parity: int) -> bool | None:
        return None if self.barrier(cta, name, i)[0] & 1 != parity else False

    def do_arrive(self, cta: int, name: str, i: int) -> None:
        phases, come, copies = self.barrier(cta, name, i)
        self.set_barrier(cta, name, i, phases, come + 1, copies)

    # Stages

    def fill(self, cta: int, i: int, token: Any, how: str) -> None:
        was, state, begun, ended = self.cells.get(("stage", cta, i), (None, "there", 0, 0))
        if was is not None and (state != "there" or (begun, ended) != (self.p.consumers,) * 2):
            raise BrokenError(f"stage {i} gets {token} while {was} is read")
        self.cells["stage", cta, i] = (token, how, 0, 0)

    def do_load(self, cta: int, i: int, token: Any) -> None:
        self.fill(cta, i, token, "under way")
        phases, come, copies = self.barrier(cta, "full", i)
        self.set_barrier(cta, "full", i, phases, come + 1, copies + 1)

    def arrive_copy(self, cta: int, i: int) -> None:
        token, _, begun, ended = self.cells["stage", cta, i]
        self.cells["stage", cta, i] = (token, "there", begun, ended)
        phases, come, copies = self.barrier(cta, "full", i)
        self.set_barrier(cta, "full", i, phases, come, copies - 1)

    def do_write(self, cta: int, i: int, token: Any) -> None:
        self.fill(cta, i, token, "there")

    def do_read(self, cta: int, i: int, token: Any) -> None:
        was, state, begun, ended = self.cells.get(("stage", cta, i), (None, "there", 0, 0))
        if was != token or state != "there":
            raise BrokenError(f"stage {i} has {was}, {state}, where {token} is read")
        self.cells["stage", cta, i] = (was, state, begun + 1, ended)

    def do_done(self, cta: int, i: int) -> None:
        was, state, begun, ended = self.cells["stage", cta, i]
        self.cells["stage", cta, i] = (was, state, begun, ended + 1)

    # Mail and counters

    def do_post(self, cta: int, slot: int, number: int, what: int) -> None:
        self.cells["mail", cta, slot] = (number, what)

    def do_mail(self, cta: int, slot: int, number: int) -> int:
        found, what = self.cells["mail", cta, slot]
        if found != number:
            raise BrokenError(f"letter {found} is read for {number}")
        return int(what)

    def do_take(self, cta: int, name: str) -> int:
        before = self.cells.get(("counter", name), 0)
        self.cells["counter", name] = before + 1
        return int(before)

    def do_store(self, cta: int, item: int) -> None:
        self.cells["s", item] = self.cells.get(("s", item), 0) + 1

    def do_raise(self, cta: int, item: int) -> None:
        self.cells["counter", "flag", item] = self.cells.get(("counter", "flag", item), 0) + 1

    def do_see(self, cta: int, item: int) -> bool | None:
        if self.cells.get(("counter", "flag", item), 0) < self.p.consumers:
            return False
        if self.cells.get(("s", item), 0) < self.p.consumers:
            raise BrokenError(f"row block {item} of s is read before it is stored")
        return None

    def do_finish(self, cta: int) -> None:
        if self.do_take(cta, "finished") == self.p.ctas - 1:
            for at in [at for at in self.cells if at[0] == "counter"]:
                del self.cells[at]
