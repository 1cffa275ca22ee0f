"""Overhead against M and against r, one line a contender, for light and dark pages."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorafast.bench.common import picture
from lorafast.bench.common.problem import PASSES, Problem
from lorafast.bench.layer.timing import Row

from lorafast.core.problem import DENSE

_SWEPT_M = {"cpu": (1, 8, 64, 512, 2048), "cuda": (16, 64, 256, 1024, 4096, 16384)}
_SWEPT_R = {"cpu": (4, 16, 64, 256), "cuda": (4, 8, 16, 32, 64, 128, 256)}


def sweep(problem: Problem, device_type: str) -> list[Problem]:
    """``problem`` at other M, then at other r."""
    shape = problem.shape
    over_M = [replace(problem, shape=replace(shape, M=M)) for M in _SWEPT_M[device_type]]
    over_r = [replace(problem, r=r) for r in _SWEPT_R[device_type]]
    return sorted({*over_M, problem, *over_r}, key=lambda p: (p.r == problem.r, p.shape.M, p.r))


def plot(rows: Sequence[Row], path: Path) -> list[Path]:
    """Draws the rows of a sweep into ``path``, and into its neighbour ``…-dark`` on a dark ground.

    Returns the files written.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no row has a time.
        OSError: a file can't be written.
    """
    panels = _panels(rows)
    return picture.save(path, lambda colours: _draw(panels, colours))


Axis = Callable[[Row], int]


def _M(row: Row) -> int:
    return row.problem.shape.M


def _r(row: Row) -> int:
    return row.problem.r


@dataclass
class Panel:
    """One pair of axes: rows that differ in ``at`` alone."""

    label: str
    title: str
    at: Axis
    rows: list[Row]


def _panels(rows: Sequence[Row]) -> list[Panel]:
    """Overhead against M, and against r."""
    timed = [row for row in rows if row.samples and row.adapted]
    if not timed:
        raise ValueError("no row has a time: nothing to draw")

    def largest(key: Axis) -> list[Row]:
        """The largest set of rows that agree in ``key``."""
        groups = [list(g) for _, g in itertools.groupby(sorted(timed, key=key), key=key)]
        return max(groups, key=len)

    over_M, over_r = largest(_r), largest(_M)
    return [
        Panel("M (tokens)", f"r = {_r(over_M[0])}", _M, over_M),
        Panel("r (rank)", f"M = {_M(over_r[0]):,}", _r, over_r),
    ]


def _draw(panels: Sequence[Panel], colours: dict[str, str]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    first = panels[0].rows[0]
    problem, shape = first.problem, first.problem.shape
    base = "" if problem.base == DENSE else f", {problem.base} base"
    dropout = f", dropout {problem.dropout_p:g}" if problem.dropout_p else ""
    layer = f"{shape.label} {shape.K} → {shape.N}, {problem.dtype}{base}{dropout}".lstrip()
    figure.suptitle(f"{layer}: {PASSES[first.which]}", color=colours["ink"])
    axes = figure.subplots(1, len(panels), sharey=True)
    dense = "" if problem.base == DENSE else f" {problem.dtype}"
    for ax, panel in zip(axes, panels, strict=True):
        _draw_panel(ax, panel, colours)
    axes[0].set_ylabel(f"time / time of the frozen{dense} layer", color=colours["ink"])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False,
        labelcolor=colours["ink"],
    )  # fmt: skip
    return figure


def _short(number: int) -> str:
    """4k for 4096: neighbours on an axis of powers of two have room for no more."""
    return f"{number // 1024}k" if number >= 1024 and number % 1024 == 0 else f"{number:,}"


def _draw_panel(ax: Any, panel: Panel, colours: dict[str, str]) -> None:
    for contender in dict.fromkeys(row.contender for row in panel.rows):
        of_contender = [row for row in panel.rows if row.contender == contender]
        points = sorted(
            ((panel.at(row), row.overhead) for row in of_contender if row.overhead is not None),
            key=lambda point: point[0],
        )
        x = [at for at, _ in points]
        colour = picture.COLOURS.get(contender, colours["ink"])
        ax.plot(x, [o.median for _, o in points], "o-", color=colour, label=contender, ms=4)
        ax.fill_between(
            x, [o.low for _, o in points], [o.high for _, o in points],
            color=colour, alpha=0.2, linewidth=0,
        )  # fmt: skip
    limits = sorted({(panel.at(row), row.limit) for row in panel.rows if row.adapted})
    ax.plot(
        *zip(*limits, strict=True),
        "--",
        color=colours["ink"],
        linewidth=1,
        label="arithmetic limit",
    )
    ax.axhline(1.0, color=colours["grid"], linewidth=1)
    ax.set_xscale("log", base=2)
    ticks = sorted({panel.at(row) for row in panel.rows})
    ax.set_xticks(ticks, [_short(tick) for tick in ticks])
    ax.minorticks_off()
    ax.set_xlabel(panel.label, color=colours["ink"])
    ax.set_title(panel.title, color=colours["ink"], fontsize="medium")
    picture.paint(ax, colours)
