"""Words, links and cells that pages share."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from lorafast.bench.common.problem import Problem

from lorafast.core.problem import DENSE

ROOT = Path(__file__).resolve().parents[2]
PERFORMANCE = ROOT / "docs" / "performance.md"
Run = dict[str, Any]
T = TypeVar("T")


def describe(problem: Problem) -> str:
    """``q,o: M=8192, 4096 → 4096, r=16, bf16``."""
    shape = problem.shape
    r = f"r={problem.r}{', DoRA' * problem.use_dora}"
    sizes = f"M={shape.M}, {shape.K} → {shape.N}, {r}, {problem.dtype}{base(problem)}"
    return f"{shape.label}: {sizes}" if shape.label else sizes


def base(problem: Problem) -> str:
    """``, nf4 base``, or nothing of a dense one."""
    return "" if problem.base == DENSE else f", {problem.base} base"


def picture(path: Path, alt: str) -> str:
    """One for light pages and one for dark ones."""
    light, dark = relative(path), relative(path.with_name(f"{path.stem}-dark.png"))
    return (
        "<picture>\n"
        f'  <source media="(prefers-color-scheme: dark)" srcset="{dark}">\n'
        f'  <img alt="{alt}" src="{light}">\n'
        "</picture>"
    )


def relative(path: Path, document: Path = PERFORMANCE) -> str:
    """A record's path as a link of ``document``."""
    inside = path.is_relative_to(ROOT)
    return Path(os.path.relpath(path, document.parent)).as_posix() if inside else path.name


def unique(items: Iterable[T]) -> list[T]:
    """Each once, in their order."""
    return list(dict.fromkeys(items))
