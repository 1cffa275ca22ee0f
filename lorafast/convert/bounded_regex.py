"""Regexes from files, matched in bounded time: a backtracking search may run for ever.

A regex with few ways through it goes to ``re``. Any other is followed through all its ways at once:
a set of positions in the text is one integer, a bit a position, and each node of the parsed regex maps
the positions where it begins to those where it can end.
"""

import importlib
import re
import sys
from typing import Any

_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_compiler: Any = importlib.import_module(
    "re._compiler" if sys.version_info >= (3, 11) else "sre_compile"
)

# About as many characters as a name has: how often a repetition may stop.
_REPETITIONS = 64
# Three repetitions and some alternatives: at worst milliseconds a name for backtracking.
_FEW = 16 * _REPETITIONS**3
# Some seconds in all.
_STEPS = 10_000_000

_ONE_CHARACTER = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
# What depends on the way taken, not on the position reached.
_BY_THE_WAY = ("GROUPREF", "GROUPREF_EXISTS", "ATOMIC_GROUP", "POSSESSIVE_REPEAT")


class BoundedRegex:
    """``regex`` from a file, compiled. Messages say where it stands, and what stands there if not it.

    Raises:
        ValueError: it is no regex, or one that can't be matched in bounded time.
    """

    def __init__(self, argument: str, regex: str, given: str | None = None) -> None:
        self._where = f"{argument} is {shortened(regex if given is None else given)}"
        try:
            self._compiled = re.compile(regex)
            tree = _parser.parse(regex)
            self._few = _ways(tree) <= _FEW
        except (re.error, OverflowError, RecursionError, MemoryError) as error:
            raise ValueError(
                f"{self._where}, which is not a regex: {error} (names go into a list)"
            ) from error
        self._tree = tree
        self._steps = 0
        self._atoms: dict[tuple[int, int], re.Pattern[str]] = {}
        self._masks: dict[tuple[int, int], int] = {}
        self._text = ""
        if not self._few:
            construct = _by_the_way(tree)
            if construct is not None:
                raise ValueError(
                    f"{self._where}, a regex with {construct} and too many ways to match a name: "
                    "write it without nested repetitions"
                )

    def fullmatch(self, text: str) -> bool:
        """Whether the regex matches all of ``text``."""
        if self._few:
            return self._compiled.fullmatch(text) is not None
        return self._ends(text) >> len(text) == 1

    def match(self, text: str) -> bool:
        """Whether the regex matches ``text`` from its beginning."""
        if self._few:
            return self._compiled.match(text) is not None
        return self._ends(text) != 0

    def groups(self, text: str) -> "re.Match[str] | None":
        """``re.match``.

        Raises:
            ValueError: the regex has too many ways for it.
        """
        if not self._few:
            raise ValueError(f"{self._where}, a regex with too many ways to match a name")
        return self._compiled.match(text)

    def _ends(self, text: str) -> int:
        """The positions at which a match that begins at 0 can end."""
        self._text = text
        self._masks.clear()
        try:
            return self._follow(self._tree, 1, self._tree.state.flags)
        except RecursionError as error:
            raise ValueError(f"{self._where}, a regex that is nested too deeply") from error

    def _follow(self, nodes: Any, at: int, flags: int) -> int:
        for node in nodes:
            if not at:
                return 0
            at = self._step(node, at, flags)
        return at

    def _step(self, node: Any, at: int, flags: int) -> int:
        self._steps += 1
        if self._steps > _STEPS:
            raise ValueError(f"{self._where}, a regex that takes too long to match names")
        kind, value = str(node[0]), node[1]
        if kind in _ONE_CHARACTER:
            return (at & self._mask(node, flags)) << 1
        if kind == "AT":
            return at & self._mask(node, flags)
        if kind == "BRANCH":
            ends = 0
            for alternative in value[1]:
                ends |= self._follow(alternative, at, flags)
            return ends
        if kind == "SUBPATTERN":
            _, added, taken, nodes = value
            return self._follow(nodes, at, (flags | added) & ~taken)
        if kind in _REPEATS:
            least, most, nodes = value
            return self._repeat(least, most, nodes, at, flags)
        if kind in ("ASSERT", "ASSERT_NOT"):
            direction, nodes = value
            found = self._looks(direction, nodes, at, flags)
            return found if kind == "ASSERT" else at & ~found
        assert kind == "FAILURE", kind
        return 0

    def _repeat(self, least: int, most: int, nodes: Any, at: int, flags: int) -> int:
        for _ in range(least):
            once_more = self._follow(nodes, at, flags)
            if once_more == at:
                break
            at = once_more
        reached, fresh, times = at, at, least
        while fresh and times < most:
            fresh = self._follow(nodes, fresh, flags) & ~reached
            reached |= fresh
            times += 1
        return reached

    def _looks(self, direction: int, nodes: Any, at: int, flags: int) -> int:
        """The positions of ``at`` that an assertion holds for."""
        if direction < 0:  # of fixed width
            return self._follow(nodes, at >> nodes.getwidth()[0], flags) & at
        bits = (1 << i for i in range(at.bit_length()) if at >> i & 1)
        return sum(bit for bit in bits if self._follow(nodes, bit, flags))

    def _mask(self, node: Any, flags: int) -> int:
        """Where in the text this character, or this place, is."""
        key = (id(node), flags)
        if key not in self._masks:
            if key not in self._atoms:
                state = _parser.State()
                state.flags = flags
                self._atoms[key] = _compiler.compile(_parser.SubPattern(state, [node]))
            found = self._atoms[key].finditer(self._text)
            self._masks[key] = sum(1 << one.start() for one in found)
        return self._masks[key]


def shortened(value: object, most: int = 200) -> str:
    """``repr(value)`` for a message, whatever a file has put into it."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or a number of too many digits
        text = f"a {type(value).__name__} of too many parts to show"
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def _ways(nodes: Any) -> float:
    """How many ways through a regex backtracking may try for one text, about."""
    ways = 1.0
    for op, value in nodes:
        kind = str(op)
        if kind == "BRANCH":
            ways *= sum(map(_ways, value[1]))
        elif kind == "SUBPATTERN":
            ways *= _ways(value[3])
        elif kind in ("ASSERT", "ASSERT_NOT"):
            ways *= _ways(value[1])
        elif kind == "ATOMIC_GROUP":
            ways *= _ways(value)
        elif kind == "GROUPREF_EXISTS":
            ways *= _ways(value[1]) + _ways(value[2] or [])
        elif kind in _REPEATS:
            least, most, body = value
            inside = _ways(body)
            if most <= 1:
                ways *= inside + (least == 0)
            elif inside > 1:
                return float("inf")
            elif least < most:
                ways *= _REPETITIONS
    return ways


def _by_the_way(nodes: Any) -> str | None:
    """What in the regex depends on the way taken, or None."""
    for op, value in nodes:
        kind = str(op)
        if kind in _BY_THE_WAY:
            return kind.lower().replace("_", " ")
        inside = {
            "BRANCH": lambda v: v[1],
            "SUBPATTERN": lambda v: [v[3]],
            "ASSERT": lambda v: [v[1]],
            "ASSERT_NOT": lambda v: [v[1]],
            "MAX_REPEAT": lambda v: [v[2]],
            "MIN_REPEAT": lambda v: [v[2]],
        }.get(kind, lambda v: [])
        for part in inside(value):
            found = _by_the_way(part)
            if found is not None:
                return found
    return None
