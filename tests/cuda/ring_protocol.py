"""The protocol of csrc/cuda/sm90.cuh as a small model, of which every interleaving is gone through.

A role is a generator that yields what it does, as the kernel's text has it; what it gets back are the
numbers that it reads. A state is how far each role has come, and what barriers, stages and mail hold.
CTAs of a cluster are numbered one after the other, the first is the leader. A stage has a part for
each of them: what that CTA copies to it; and of helpers' items one that the CTA's own writers write.
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
WRITTEN = "written"
"""The part of an item's stage that is not copied."""


class BrokenError(Exception):
    """What is wrong in some interleaving."""


@dataclass(frozen=True)
class Protocol:
    """Sizes, and how the protocol is broken: a name that a role asks for."""

    stages: int = 2
    ctas: int = 1
    cluster: int = 1
    tiles: int = 3
    k_steps: int = 2
    rank_steps: int = 1
    consumers: int = 1
    helpers: int = 0
    """Clusters."""
    items: int = 1
    """Sets of row blocks; the tiles' ones are taken in turn."""
    masked: bool = False
    """Whether tiles have a mask: one more step that is written, before ranks."""
    broken: str = ""

    def steps(self, ranks: bool) -> int:
        """Of a tile's ring."""
        return self.rank_steps + self.masked if ranks else self.k_steps

    # Roles of a CTA

    def loader(self) -> Role:
        """Loads K blocks, grants what is written; the leader's takes items and tiles."""
        at = itertools.count()

        def load(ranks: bool, what: int) -> Role:
            for step in range(self.steps(ranks)):
                i = next(at)
                if not (ranks and self.broken == "grants unseen"):
                    yield "wait", "empty", i % self.stages, (i // self.stages & 1) ^ 1
                if ranks:
                    yield "arrive", "granted", i % self.stages
                else:
                    copies = 1 if self.broken == "expects its own" else self.cluster
                    yield "expect", i % self.stages, copies, 1
                    for to in range(self.cluster):
                        yield "load", i % self.stages, (what, step), to

        def load_item(what: int) -> Role:
            """A block of x to this CTA alone. Who writes beside it arrives for both."""
            for step in range(self.k_steps):
                i = next(at)
                stage = i % self.stages
                grants: list[Does] = [("arrive", "granted", stage)]
                copies = self.cluster if self.broken == "expects the other's x" else 1
                comes = 1 if self.broken == "expects and arrives" else 0
                loads: list[Does] = [
                    ("expect", stage, copies, comes), ("load", stage, (what, step), None)
                ]  # fmt: skip
                if self.broken != "loads items unseen":
                    yield "wait", "empty", stage, (i // self.stages & 1) ^ 1
                early = self.broken == "grants before it expects"
                yield from grants + loads if early else loads + grants

        leads = yield ("leads",)
        queues = self.draws() if leads else iter(())
        drawn: Does | None = next(queues, None)
        for i in itertools.count():
            if leads:
                while drawn is not None and drawn[0] == "take":
                    drawn = queues.send((yield drawn))
                assert drawn is not None
                _, what = drawn
                drawn = next(queues, None)
                if self.broken != "posts unseen":
                    yield "wait", "taken", i % MAIL, (i // MAIL & 1) ^ 1
                for to in range(1 if self.broken == "posts to itself" else self.cluster):
                    yield "post", i % MAIL, i, what, to
            if not (leads or self.broken == "loads unasked"):
                yield "wait", "posted", i % MAIL, i // MAIL & 1
            if not leads:
                what = yield "mail", i % MAIL, i
            if what == END:
                break
            if what < 0:
                yield from load_item(what)
                continue
            for ranks in (False, True):
                yield from load(ranks, what)
        if self.broken == "counted by the loader":
            yield ("finish",)
        yield from self.leave()

    def draws(self) -> Iterator[Any]:
        """What a leader takes from the queues, one ahead, and between, as "do", what comes of it."""
        queues = [("tiles", self.tiles)]
        if self.helpers and (yield "take", "tickets") < self.helpers:
            queues.insert(self.broken == "takes tiles first", ("items", self.items))
        for name, most in queues:
            number = yield "take", name
            while number < most:
                ahead = yield "take", name
                yield "do", number if name == "tiles" else END - 1 - number
                number = ahead
        yield "do", END

    def leave(self) -> Role:
        """Nobody does before the whole cluster; nor before its CTA, where that has helped."""
        if (self.cluster > 1 or self.helpers) and self.broken != "leaves alone":
            yield ("come",)
            yield ("met",)

    def tell_taken(self, slot: int) -> Role:
        """The leader hears that mail was taken."""
        yield "arrive", "taken", slot, None if self.broken == "takes for itself" else 0

    def writer(self) -> Role:
        """Writes rank blocks, once s is there, and items' factors."""
        at, grants = 0, [0] * self.stages
        for i in itertools.count():
            yield "wait", "posted", i % MAIL, i // MAIL & 1
            tile = yield "mail", i % MAIL, i
            if tile == END:
                break
            if tile >= 0:
                at += self.k_steps
                for step in range(self.steps(True)):
                    stage = at % self.stages
                    if self.broken == "waits for stages alone":
                        yield "wait", "empty", stage, (at // self.stages & 1) ^ 1
                    else:
                        yield "wait", "granted", stage, grants[stage]
                        grants[stage] ^= 1
                    if self.helpers and step == 0:
                        yield "see", tile % self.items
                    yield "write", stage, (tile, self.k_steps + step)
                    yield "arrive", "full", stage
                    at += 1
            else:
                for step in range(self.k_steps):
                    stage = at % self.stages
                    if self.broken != "writes ungranted":
                        yield "wait", "granted", stage, grants[stage]
                    grants[stage] ^= self.broken != "forgets a grant"
                    yield "write", stage, (tile, step), WRITTEN
                    yield "arrive", "full", stage
                    at += 1
            yield from self.tell_taken(i % MAIL)
        # Who has helped is counted behind its cluster's last flag.
        first: list[Role] = [iter([("finish",)]), self.leave()]
        if self.broken == "counted by the loader":
            del first[0]
        for steps in reversed(first) if self.helpers else first:
            yield from steps

    def consumer(self) -> Role:
        """Multiplies, a step behind the last one at the most."""
        at, held = 0, None
        ahead = 1 if self.broken == "releases early" else 0
        for i in itertools.count():
            yield "wait", "posted", i % MAIL, i // MAIL & 1
            tile = yield "mail", i % MAIL, i
            if tile == END:
                yield from self.leave()
                return
            for ranks in (False, True) if tile >= 0 else (False,):
                for step in range(self.steps(ranks)):
                    stage = at % self.stages
                    if self.broken != "reads unseen":
                        yield "wait", "full", stage, at // self.stages & 1
                    yield "read", stage, (tile, step + self.k_steps * ranks)
                    at += 1
                    at_once = ranks and self.masked  # a mask before the K block that is held
                    if at_once:
                        yield from self.release(stage, ahead)
                    if held is not None:
                        yield from self.release(held, ahead)
                    held = None if at_once else stage
            if held is not None:
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
            yield from self.tell_taken(i % MAIL)

    def release(self, stage: int, early: int) -> Role:
        """The products of a stage end, then it is given back, to all that copy to it."""
        told: list[int | None] = list(range(self.cluster))
        if self.broken == "tells itself":
            told = [None] * self.cluster
        elif self.broken == "tells the leader":
            told = [0]
        tells: list[Does] = [("arrive", "empty", stage, to) for to in told]
        done: list[Does] = [("done", stage)]
        yield from tells + done if early else done + tells

    # States

    @functools.cached_property
    def roles(self) -> tuple[str, ...]:
        """Of a CTA."""
        return ("loader", "writer", *["consumer"] * self.consumers)

    @functools.cached_property
    def arrivals(self) -> dict[str, int]:
        """That end a phase."""
        heard = 1 if self.broken == "hears of one CTA" else self.cluster
        readers = 1 if self.broken == "counts its own readers" else self.cluster
        return {
            "full": 1, "empty": self.consumers * heard, "granted": 1, "posted": 1,
            "taken": (self.consumers + 1) * readers,
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


GETS = ("take", "mail", "leads")
"""Steps that give a number back."""
AT_ONCE = {
    "wait": ("mail", "read", "write", "expect", "post"), "see": ("write",), "mail": ("come",),
    "leads": ("wait", "take"), "take": ("wait", "post"), "post": ("post",), "expect": ("load",),
    "load": ("load",), "write": ("arrive",), "done": ("arrive",), "store": ("raise",),
    "finish": ("come",),
}  # fmt: skip
"""What a role does in the same step as what is before it. Nothing that others do between the two could
come to another end: a wait that ends begins to read, what is read has ended when its stage is given
back; mail that comes later to one CTA is as if that one read later; copies arrive on their own."""
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
        """The states after one step; of one cluster alone if the others' can come later."""
        found = []
        for first in range(0, self.p.ctas, self.p.cluster):
            of = [self.following_of(cta) for cta in range(first, first + self.p.cluster)]
            own = [after for states, _ in of for after in states]
            if own and all(alone for _, alone in of):
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

    def cta_of(self, cta: int, to: int | None) -> int:
        """A CTA of its cluster, or itself. It must not have ended."""
        if to is None:
            return cta
        other = cta // self.p.cluster * self.p.cluster + to
        if all(self.next_of(other, role) is None for role in range(len(self.p.roles))):
            raise BrokenError(f"CTA {cta} reaches CTA {other}, which has ended")
        return other

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

    def do_arrive(self, cta: int, name: str, i: int, to: int | None = None) -> None:
        cta = self.cta_of(cta, to)
        phases, come, copies = self.barrier(cta, name, i)
        self.set_barrier(cta, name, i, phases, come + 1, copies)

    # Stages

    def part(self, cta: int, i: int, part: Any) -> tuple[Any, str, int, int]:
        return self.cells.get(("stage", cta, i, part), (None, "there", 0, 0))

    def fill(self, cta: int, i: int, part: Any, token: Any, how: str) -> None:
        """Over all that was there of something else, which must have been read."""
        for other in (*range(self.p.cluster), WRITTEN):
            was, state, begun, ended = self.part(cta, i, other)
            if was is None or (was == token and other != part):
                continue
            if state != "there" or (begun, ended) != (self.p.consumers,) * 2:
                raise BrokenError(f"stage {i} gets {token} while {was} is read")
            del self.cells["stage", cta, i, other]
        self.cells["stage", cta, i, part] = (token, how, 0, 0)

    def do_expect(self, cta: int, i: int, copies: int, comes: int) -> None:
        phases, come, due = self.barrier(cta, "full", i)
        self.set_barrier(cta, "full", i, phases, come + comes, due + copies)

    def do_load(self, cta: int, i: int, token: Any, to: int | None) -> None:
        part = cta % self.p.cluster
        self.fill(self.cta_of(cta, to), i, part, token, "under way")

    def arrive_copy(self, cta: int, i: int, part: Any) -> None:
        token, _, begun, ended = self.part(cta, i, part)
        self.cells["stage", cta, i, part] = (token, "there", begun, ended)
        phases, come, due = self.barrier(cta, "full", i)
        self.set_barrier(cta, "full", i, phases, come, due - 1)

    def do_write(self, cta: int, i: int, token: Any, *parts: Any) -> None:
        for part in parts or range(self.p.cluster):
            self.fill(cta, i, part, token, "there")

    def do_read(self, cta: int, i: int, token: Any) -> None:
        item = token[0] < 0
        for part in (cta % self.p.cluster, WRITTEN) if item else range(self.p.cluster):
            was, state, begun, ended = self.part(cta, i, part)
            if was != token or state != "there":
                raise BrokenError(f"stage {i} has {was}, {state}, where {token} is read")
            self.cells["stage", cta, i, part] = (was, state, begun + 1, ended)

    def do_done(self, cta: int, i: int) -> None:
        for part in (*range(self.p.cluster), WRITTEN):
            was, state, begun, ended = self.part(cta, i, part)
            if was is not None:
                self.cells["stage", cta, i, part] = (was, state, begun, ended + 1)

    # A cluster

    def do_leads(self, cta: int) -> int:
        return int(cta % self.p.cluster == 0)

    def do_come(self, cta: int) -> None:
        at = "come", cta // self.p.cluster
        self.cells[at] = self.cells.get(at, 0) + 1

    def do_met(self, cta: int) -> bool | None:
        everyone = self.p.cluster * len(self.p.roles)
        return None if self.cells["come", cta // self.p.cluster] == everyone else False

    # Mail and counters

    def do_post(self, cta: int, slot: int, number: int, what: int, to: int) -> None:
        cta = self.cta_of(cta, to)
        self.cells["mail", cta, slot] = (number, what)
        self.do_arrive(cta, "posted", slot)

    def do_mail(self, cta: int, slot: int, number: int) -> int:
        found, what = self.cells.get(("mail", cta, slot), (None, None))
        if found != number:
            raise BrokenError(f"letter {found} is read for {number}")
        return int(what)

    def do_take(self, cta: int, name: str) -> int:
        before = self.cells.get(("counter", name), 0)
        self.cells["counter", name] = before + 1
        return int(before)

    def block(self, cta: int, item: int) -> int:
        """This CTA's row block of a set."""
        return item * self.p.cluster + cta % self.p.cluster

    def do_store(self, cta: int, item: int) -> None:
        at = "s", self.block(cta, item)
        self.cells[at] = self.cells.get(at, 0) + 1

    def do_raise(self, cta: int, item: int) -> None:
        at = "counter", "flag", self.block(cta, item)
        self.cells[at] = self.cells.get(at, 0) + 1

    def do_see(self, cta: int, item: int) -> bool | None:
        block = self.block(cta, item)
        if self.cells.get(("counter", "flag", block), 0) < self.p.consumers:
            return False
        if self.cells.get(("s", block), 0) < self.p.consumers:
            raise BrokenError(f"row block {block} of s is read before it is stored")
        return None

    def do_finish(self, cta: int) -> None:
        if self.do_take(cta, "finished") == self.p.ctas - 1:
            for at in [at for at in self.cells if at[0] == "counter"]:
                del self.cells[at]
