"""Overhead of each kind, PEFT's and accelerated, a panel a layer, for light and dark pages."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorafast.bench.common import picture
from lorafast.bench.relatives.job import Row, by_kind, describe
from lorafast.bench.relatives.kinds import FAST, STOCK

_OFFSETS = {STOCK: -0.15, FAST: 0.15}


def plot(rows: Sequence[Row], path: Path) -> list[Path]:
    """Draws ``rows`` into ``path``, and into its neighbour ``…-dark`` on a dark ground.

    Returns the files written.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no adapter has a time.
        OSError: a file can't be written.
    """
    layers = [(title, list(of)) for title, of in itertools.groupby(rows, key=describe)]
    timed = [one for one in layers if any(row.kind and row.samples for row in one[1])]
    if not timed:
        raise ValueError("no adapter has a time: nothing to draw")
    return picture.save(path, lambda colours: _draw(timed, colours))


def _draw(layers: Sequence[tuple[str, Sequence[Row]]], colours: dict[str, str]) -> Any:
    from matplotlib.figure import Figure

    columns = min(len(layers), 2)
    lines = -(-len(layers) // columns)
    figure = Figure(figsize=(4.8 * columns, 0.6 + 3.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for ax in axes.flat[len(layers) :]:
        ax.set_axis_off()
    for ax, (title, rows) in zip(axes.flat, layers, strict=False):
        _draw_panel(ax, rows, colours)
        ax.set_title(title.rpartition(", ")[0], color=colours["ink"], fontsize="medium")
    for ax in axes[:, 0]:
        ax.set_ylabel("time / time of the frozen layer", color=colours["ink"])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False,
        labelcolor=colours["ink"],
    )  # fmt: skip
    return figure


def _draw_panel(ax: Any, rows: Sequence[Row], colours: dict[str, str]) -> None:
    kinds = by_kind(rows)
    for index, contender in enumerate((STOCK, FAST)):
        points = [
            (place, pair[index].overhead)
            for place, pair in enumerate(kinds.values())
            if pair[index].overhead is not None
        ]
        medians = [o.median for _, o in points if o is not None]
        around = [
            [o.median - o.low for _, o in points if o is not None],
            [o.high - o.median for _, o in points if o is not None],
        ]
        ax.errorbar(
            [place + _OFFSETS[contender] for place, _ in points], medians, around, fmt="o", ms=5,
            color=picture.COLOURS[contender], label=contender, capsize=2,
        )  # fmt: skip
    ax.axhline(1.0, color=colours["grid"], linewidth=1)
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xticks(range(len(kinds)), [name.replace(", ", "\n") for name in kinds], fontsize="small")
    picture.paint(ax, colours)
