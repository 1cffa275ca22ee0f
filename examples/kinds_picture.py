"""The picture of `finetune_kinds.py`: accuracy against trained parameters, and time and memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

COLORS = ("#0072B2", "#D55E00", "#009E73", "#888888")
DARK_COLORS = ("#56B4E9", "#F0905A", "#2CC295", "#A0A0A0")
INK = ("#222222", "#ffffff")
DARK_INK = ("#d6dbe1", "#0d1117")
POINT = 4.5  # the radius of a point, in points


@dataclass(frozen=True)
class Point:
    name: str
    family: str
    accuracy: float
    trained: int
    step_seconds: float
    peak_bytes: int


def draw(
    points: Sequence[Point], path: Path, subtitle: str, half_interval: float, *, dark: bool
) -> Path:
    ink, paper = DARK_INK if dark else INK
    style = {
        "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink, "xtick.color": ink,
        "ytick.color": ink, "axes.facecolor": paper, "figure.facecolor": paper,
        "legend.labelcolor": ink,
    }  # fmt: skip
    families = list(dict.fromkeys(point.family for point in points))
    colors = dict(zip(families, DARK_COLORS if dark else COLORS, strict=False))
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11, 5.6), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, width_ratios=[1.45, 1])
        figure.suptitle(f"Fine-tuning all-MiniLM-L6-v2, one kind of adapter at a time\n{subtitle}")
        _scatter(left, points, colors, half_interval, ink)
        _bars(right, points, colors)
        for axes in (left, right):
            axes.grid(alpha=0.2)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        canvas.draw()
        figure.set_layout_engine("none")  # where the names go depends on the layout
        _name_points(left, points, canvas, ink)
        figure.savefig(path, dpi=130)
    return path


def _scatter(
    axes: Axes, points: Sequence[Point], colors: dict[str, str], half_interval: float, ink: str
) -> None:
    for family, color in colors.items():
        of_family = [p for p in points if p.family == family]
        x, y = [p.trained for p in of_family], [p.accuracy for p in of_family]
        axes.plot(x, y, "o", color=color, markersize=2 * POINT, markeredgewidth=0, label=family)
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters, with the head")
    axes.set_ylabel("test accuracy")
    axes.margins(x=0.12, y=0.12)
    low = min(p.accuracy for p in points)
    axes.errorbar(
        [0.965], [low + half_interval], yerr=half_interval, color=ink, capsize=3, linewidth=1,
        transform=axes.get_yaxis_transform(),
    )  # fmt: skip
    axes.annotate(
        "95 %", (0.965, low + half_interval), (-6, 0), xycoords=axes.get_yaxis_transform(),
        textcoords="offset points", ha="right", va="center", fontsize=8,
    )  # fmt: skip
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, frameon=False, fontsize=9)


def _bars(axes: Axes, points: Sequence[Point], colors: dict[str, str]) -> None:
    names = [point.name for point in points]
    seconds = [point.step_seconds for point in points]
    axes.barh(names, seconds, color=[colors[point.family] for point in points])
    for point in points:
        text = f" {point.step_seconds:.3f} s, {point.peak_bytes / 1e6:.0f} MB"
        axes.text(point.step_seconds, point.name, text, va="center", fontsize=8)
    axes.set_xlabel("seconds a step; in MB: its peak memory")
    axes.set_xlim(0, max(seconds) * 1.38)
    axes.invert_yaxis()


def _name_points(axes: Axes, points: Sequence[Point], canvas: FigureCanvasAgg, ink: str) -> None:
    """Write each point's name in the nearest place that is free, a line to it if it is far."""
    scale = axes.figure.dpi / 72
    centers = [axes.transData.transform((p.trained, p.accuracy)) for p in points]
    taken = [Bbox([c - POINT * scale, c + POINT * scale]) for c in centers]
    renderer = canvas.get_renderer()
    taken += [text.get_window_extent(renderer) for text in axes.texts]
    ends = axes.get_yaxis_transform().transform([(0.95, 0), (0.98, 0)])[:, 0]
    inside = axes.get_window_extent(renderer)
    taken.append(Bbox.from_extents(ends[0], inside.y0, ends[1], inside.y1))  # the interval
    for point in points:
        for distance, angle in _places():
            dx, dy = distance * math.cos(angle), distance * math.sin(angle)
            far = distance > 2.5 * POINT
            name = axes.annotate(
                point.name,
                (point.trained, point.accuracy),
                (dx, dy),
                textcoords="offset points",
                ha="center" if abs(math.cos(angle)) < 0.5 else "left" if dx > 0 else "right",
                va="center" if abs(math.sin(angle)) < 0.5 else "bottom" if dy > 0 else "top",
                fontsize=9,
                arrowprops={"arrowstyle": "-", "color": ink, "lw": 0.5, "shrinkB": 4}
                if far
                else None,
            )
            name.update_positions(renderer)
            box = matplotlib.text.Text.get_window_extent(name, renderer).padded(1)
            if not box.overlaps(inside) or box.count_overlaps(taken) or not _within(box, inside):
                name.remove()
                continue
            taken.append(box)
            break


def _within(box: Bbox, outer: Bbox) -> bool:
    return outer.x0 <= box.x0 and box.x1 <= outer.x1 and outer.y0 <= box.y0 and box.y1 <= outer.y1


def _places() -> Iterator[tuple[float, float]]:
    """Distances and angles from a point, the nearest first."""
    for distance in (1.6, 2.2, 3, 4, 5, 6.5, 8, 10, 13):
        for eighth in (0, 2, 6, 4, 1, 7, 3, 5):
            yield distance * POINT, eighth * math.pi / 4
