"""Runs a page: its Python in order, and compares what it shows with what it prints.

A block below ``<!-- not run -->`` is left out. The lines of ``sh`` blocks are commands, not run here.
"""

import contextlib
import doctest
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"^(<!-- not run -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (\S+\.py)\n")
_CHECKER = doctest.OutputChecker()


@dataclass(frozen=True)
class Block:
    """``file``: the path in its first line, if it has one; ``shown``: the output shown below it."""

    line: int
    code: str
    file: str | None
    shown: str | None


def blocks(page: Path) -> list[Block]:
    """The ``python`` blocks of a page, each with the ``text`` block that follows it."""
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    for match in _BLOCK.finditer(text):
        left_out, language, content = match.groups()
        if left_out:
            continue
        if language == "python":
            path = _FILE.match(content)
            line = text.count("\n", 0, match.start()) + 2
            found.append(Block(line, content, path and path[1], None))
        elif language == "text":
            last = found.pop()
            assert last.file is None, f"{page.name}:{last.line}: a file prints nothing"
            assert last.shown is None, f"{page.name}:{last.line}: its output is shown twice"
            found.append(Block(last.line, last.code, None, content))
    return found


def not_run(page: Path) -> list[str]:
    """The Python that is marked as not run."""
    found = _BLOCK.findall(page.read_text(encoding="utf-8"))
    return [content for left_out, language, content in found if left_out and language == "python"]


def commands(page: Path) -> list[str]:
    """The commands of the ``sh`` blocks, without their comments."""
    text = page.read_text(encoding="utf-8")
    shell = [content for _, language, content in _BLOCK.findall(text) if language == "sh"]
    lines = [line.partition(" #")[0].strip() for content in shell for line in content.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def write_files(page: Path, root: Path) -> list[Path]:
    """The blocks that begin with a path, as files below ``root``."""
    written = []
    for block in blocks(page):
        if block.file is not None:
            path = root / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.code, encoding="utf-8")
            written.append(path)
    return written


def run(page: Path) -> dict[str, Any]:
    """Runs the other blocks, one after the other, in one namespace, which it returns.

    In what is shown ``...`` stands for anything.

    Raises:
        AssertionError: a block prints something else than what is shown below it.
    """
    names: dict[str, Any] = {"__name__": "page"}
    for block, printed in _outputs(page, names):
        if block.shown is None:
            assert printed == "", f"{page.name}:{block.line} prints what is not shown:\n{printed}"
            continue
        alike = _CHECKER.check_output(block.shown, printed, doctest.ELLIPSIS)
        assert alike, f"{page.name}:{block.line} shows\n{block.shown}\nand prints\n{printed}"
    return names


def _outputs(page: Path, names: dict[str, Any]) -> Iterator[tuple[Block, str]]:
    for block in blocks(page):
        if block.file is None:
            # Errors name the page's own line.
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, names)
            yield block, printed.getvalue()
