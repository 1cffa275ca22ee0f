"""Pictures for light and dark pages: their colours, and where they go."""

import errno
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorafast.core.files import write_whole

# Okabe and Ito's colours, told apart by every eye and on both grounds.
COLOURS = {
    "lorafast": "#D55E00",
    "lorafast-compiled": "#E69F00",
    "accelerated": "#D55E00",
    "peft": "#0072B2",
    "peft-compiled": "#56B4E9",
    "aten": "#009E73",
    "triton": "#CC79A7",
    "cuda": "#F0E442",
    "reference": "#999999",
}
GROUNDS = {
    "": {"ground": "#ffffff", "ink": "#24292f", "grid": "#d0d7de"},
    "-dark": {"ground": "#0d1117", "ink": "#e6edf3", "grid": "#30363d"},
}


def save(path: Path, draw: Callable[[dict[str, str]], Any]) -> list[Path]:
    """Writes the figures that ``draw`` makes of the colours of a ground: ``path``, and its neighbour
    ``…-dark``. Returns both.

    Raises:
        OSError: a file can't be written.
    """
    for target, colours in zip(targets(path), GROUNDS.values(), strict=True):
        figure, picture = draw(colours), io.BytesIO()
        kind = target.suffix.removeprefix(".").lower()
        figure.savefig(picture, format=kind, dpi=150, facecolor=colours["ground"])
        write_whole(target, picture.getvalue())
    return targets(path)


def paint(ax: Any, colours: dict[str, str]) -> None:
    """Ground, ink and a quiet grid for one pair of axes."""
    ax.set_facecolor(colours["ground"])
    ax.tick_params(colors=colours["ink"])
    ax.grid(axis="y", color=colours["grid"], linewidth=0.6)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(colours["grid"])


def targets(path: Path) -> list[Path]:
    """The files that ``save`` writes, on a light and on a dark ground; a ``.png`` if nothing is said."""
    suffix = path.suffix or ".png"
    return [path.with_name(f"{path.stem}{ground}{suffix}") for ground in GROUNDS]


def prepare(path: Path) -> None:
    """Makes the folder of a picture, before anything is measured for it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib can't draw such a file.
        OSError: it can't be written, or what is there is no file.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if not path.name or path.suffix.removeprefix(".").lower() not in ("", *known):
        raise ValueError(f"the picture is {str(path)!r}, expected a file of {', '.join(known)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    for target in (path, *targets(path)):
        if target.exists() and not target.is_file():
            raise OSError(
                errno.EINVAL, "a picture can't be written there: it is no file", str(target)
            )
