"""Faults planted in a kernel's PTX: a statement dropped, changed or moved, and nothing else.

    edit = Planted("linear_expand_kernel", (drop(r"bar\\.sync", 3),))
    with executed(arch=80, edit=edit): ...

A statement is a line of the kernel's body; comments and directives are none. Patterns are regular
expressions, ``nth`` counts the statements that one is found in (from the end where it is negative).
What a compiler has unrolled is edited in every copy: ``nth=EVERY``.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

EVERY = None


class NotPlantedError(Exception):
    """The text has no such place, or the edit would leave it as it is."""


@dataclass(frozen=True)
class Change:
    """What became of a statement."""

    line: int
    was: str
    reads: str

    def __str__(self) -> str:
        return f"{self.was} -> {self.reads}" if self.reads else f"without {self.was}"


Lines = dict[int, str]
"""Statements by the number of their line: no edit moves any other."""
Edit = Callable[[Lines], list[Change]]


def drop(pattern: str, nth: int | None = 0) -> Edit:
    """Without the statement."""
    return change(rf"^.*{pattern}.*$", "", nth)


def change(pattern: str, to: str, nth: int | None = 0) -> Edit:
    """What the pattern finds in the statement is replaced, as by ``re.sub``, once."""

    def edit(lines: Lines) -> list[Change]:
        changes = []
        for line in _places(lines, pattern, nth):
            was = lines[line]
            lines[line] = re.sub(pattern, to, was, count=1)
            if lines[line] == was:
                raise NotPlantedError(f"{pattern!r} -> {to!r} leaves line {line} as it is: {was}")
            changes.append(Change(line, was, lines[line]))
        return changes

    return edit


def after(anchor: str, edit: Edit, nth: int = 0) -> Edit:
    """An edit that sees only the statements behind the one that ``anchor`` finds."""

    def edit_behind(lines: Lines) -> list[Change]:
        (start,) = _places(lines, anchor, nth)
        behind = {line: text for line, text in lines.items() if line > start}
        done = edit(behind)
        lines.update(behind)
        return done

    return edit_behind


def before(anchor: str, edit: Edit, nth: int = 0) -> Edit:
    """An edit that sees only the statements before the one that ``anchor`` finds."""

    def edit_ahead(lines: Lines) -> list[Change]:
        (stop,) = _places(lines, anchor, nth)
        ahead = {line: text for line, text in lines.items() if line < stop}
        done = edit(ahead)
        lines.update(ahead)
        return done

    return edit_ahead


def delay(pattern: str, past: str, nth: int = 0) -> Edit:
    """The last statement that ``pattern`` finds before one that ``past`` finds stands below that."""

    def edit(lines: Lines) -> list[Change]:
        (target,) = _places(lines, past, nth)
        return [_move(lines, pattern, [o for o in lines if o < target], target, "{1} {0}")]

    return edit


def hoist(pattern: str, past: str, nth: int = 0) -> Edit:
    """The first statement that ``pattern`` finds behind one that ``past`` finds stands above that."""

    def edit(lines: Lines) -> list[Change]:
        (target,) = _places(lines, past, nth)
        behind = [o for o in lines if o > target]
        return [_move(lines, pattern, behind[::-1], target, "{0} {1}")]

    return edit


def _move(lines: Lines, pattern: str, among: list[int], target: int, order: str) -> Change:
    found = [line for line in among if re.search(pattern, lines[line])]
    if not found:
        raise NotPlantedError(f"{pattern!r} is not found on that side of {lines[target]}")
    moved, there = lines[found[-1]], lines[target]
    lines[found[-1]], lines[target] = "", order.format(moved, there)
    return Change(target, moved, order.format(moved, there))


def _places(lines: Lines, pattern: str, nth: int | None) -> list[int]:
    found = [line for line, text in lines.items() if re.search(pattern, text)]
    if nth is EVERY and found:
        return found
    if nth is EVERY or not -len(found) <= nth < len(found):
        raise NotPlantedError(
            f"{pattern!r} is found in {len(found)} statements: none is number {nth}"
        )
    return [found[nth]]


@dataclass
class Planted:
    """A callable for ``executed``'s ``edit``: changes the text of its kernel, and no other."""

    kernel: str
    edits: tuple[Edit, ...]
    changes: list[Change] = field(default_factory=list)

    def __call__(self, ptx: str) -> str:
        lines = ptx.splitlines()
        body = _body(lines, self.kernel)
        if body is None:
            return ptx
        statements = {
            i + 1: text.strip() for i in body if (text := _statement(lines[i])) is not None
        }
        edited = dict(statements)
        self.changes = [change for edit in self.edits for change in edit(edited)]
        for line, text in edited.items():
            if text != statements[line]:
                lines[line - 1] = text
        return "\n".join(lines) + "\n"


_ENTRY = re.compile(r"\.entry\s+([\w$]+)")


def _body(lines: list[str], kernel: str) -> range | None:
    """The lines between the braces of a kernel; None if the module hasn't got it."""
    start = next(
        (i for i, text in enumerate(lines) if (m := _ENTRY.search(text)) and m[1] == kernel), None
    )
    if start is None:
        return None
    depth = 0
    first = last = start
    while depth or first == start:
        last += 1
        text = lines[last].split("//")[0]
        if depth == 0 and "{" in text:
            first = last
        depth += text.count("{") - text.count("}")
    return range(first + 1, last)


def _statement(line: str) -> str | None:
    text = line.split("//")[0].strip()
    return text if text and not text.startswith(".") else None
