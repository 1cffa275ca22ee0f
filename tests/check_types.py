"""Checks types: mypy on a tree where ``kernels/`` and ``bench/`` lie where they are imported from.

    python tests/check_types.py [mypy's options]

``lorafast.kernels`` and ``lorafast.bench`` find their folders at run time, which no checker follows. So
``build/types`` is laid out as an installed package is, in links, and that is checked; paths are printed
as they are in the checkout. Functions of ``triton.jit`` are left out: they are Triton's language in
Python's syntax.
"""

import ast
import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_TREE = "build/types"
_OWN_FOLDERS = ("kernels", "bench")  # at the top, imported from lorafast
_LAID = re.compile(rf"^{_TREE}/(?:lorafast/(?=(?:{'|'.join(_OWN_FOLDERS)})/\w+/))?")
_SAID = re.compile(r"^(?P<path>[^:]+\.py):(?P<line>\d+): (?P<kind>error|note): ")
_CRASHED = 2


def lay_out() -> None:
    """``build/types/lorafast``, whose folders are links to those of the checkout."""
    package = ROOT / _TREE / "lorafast"
    shutil.rmtree(package, ignore_errors=True)
    for source in (ROOT / "lorafast").iterdir():
        if source.name not in (*_OWN_FOLDERS, "__pycache__"):
            _link(source, package / source.name)
    for top in _OWN_FOLDERS:
        _link(ROOT / "lorafast" / top / "__init__.py", package / top / "__init__.py")
        for init in (ROOT / top).glob("*/__init__.py"):
            _link(init.parent, package / top / init.parent.name)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source)


def kept(said: list[str]) -> list[str]:
    """mypy's lines on Python, under the paths of the checkout."""
    lines = []
    for line in said:
        shown = _LAID.sub("", line)
        found = _SAID.match(shown)
        if found and int(found["line"]) in _device_lines(found["path"]):
            continue
        if not shown.startswith(("Found ", "Success: ")):
            lines.append(shown)
    return lines


@functools.cache
def _device_lines(path: str) -> frozenset[int]:
    """The lines of a file that are in functions of ``triton.jit``."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and any(map(_is_jit, node.decorator_list)):
            first = min(decorator.lineno for decorator in node.decorator_list)
            lines.update(range(first, (node.end_lineno or first) + 1))
    return frozenset(lines)


def _is_jit(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(called) == "triton.jit"


def main() -> int:
    """0 if nothing is wrong."""
    lay_out()
    process = subprocess.run(
        [sys.executable, "-m", "mypy", *sys.argv[1:]],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    lines = kept(process.stdout.splitlines())
    print("\n".join(lines or ["no error in types"]))
    # Status 2 is mypy's own failure: nothing was checked then.
    return _CRASHED if process.returncode == _CRASHED else int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
