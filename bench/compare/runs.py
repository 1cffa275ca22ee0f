"""Sets the overheads of two recorded runs side by side, row by row."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorafast.bench.common.clock import Summary, Timed
from lorafast.bench.common.contenders import FROZEN
from lorafast.bench.common.record import read, rows_of
from lorafast.bench.common.table import table
from lorafast.bench.layer import Row as LayerRow
from lorafast.bench.models import Row as ModelRow

_LAYER_KINDS = ("layer", "sweep", "call_overhead")
NOTE = "slower, faster: the middle halves don't overlap; a run is one draw, repeat to believe it"


def compare(before: Path, after: Path) -> str:
    """A table of the rows that both runs have: overheads, change, and whether it exceeds the spread.

    Ratios to the frozen layer of the same run are compared, not times: those depend on the day.

    Raises:
        ValueError: a file is not a recorded run, a row of it is none, or the runs have no row in common.
    """
    runs = read(before), read(after)
    lines = [
        f"{letter}: {path}: {_origin(run)}"
        for letter, path, run in zip("AB", (before, after), runs, strict=True)
    ]
    if runs[0]["machine"]["device"] != runs[1]["machine"]["device"]:
        lines.append("these are different devices")
    one, two = (
        dict(_overheads(run, path)) for run, path in zip(runs, (before, after), strict=True)
    )
    common = [key for key in one if key in two]
    if not common:
        raise ValueError(f"{before} and {after} have no row in common")
    cells = [(*key, *_change(one[key], two[key])) for key in common]
    header = ("", "", "A", "middle half", "B", "middle half", "B / A", "")
    return "\n".join([*lines, "", table(header, cells, left=2), "", NOTE])


def _origin(run: dict[str, Any]) -> str:
    machine = run["machine"]
    return f"{machine['device']}, {run['started']}, commit {machine.get('commit') or 'unknown'}"


def _overheads(run: dict[str, Any], path: Path) -> Iterator[tuple[tuple[str, str], Summary]]:
    """``(what, contender)`` and its overhead, for every timed row but the baselines."""
    for kind in _LAYER_KINDS:
        for i, row in enumerate(rows_of(run, kind, LayerRow, path)):
            overhead = _overhead(row, f"{path}: {kind}[{i}]")
            if overhead is not None and row.contender != FROZEN:
                yield (f"{row.problem}  {row.which}", row.contender), overhead
    for i, step in enumerate(rows_of(run, "models", ModelRow, path)):
        overhead = _overhead(step, f"{path}: models[{i}]")
        if overhead is not None and step.contender != FROZEN:
            what = f"{step.model}  {step.layers} blocks, {step.tokens} tokens, {step.dtype}, r={step.r}"
            yield (what, step.contender), overhead


def _overhead(row: Timed, where: str) -> Summary | None:
    if not all(sample > 0 for sample in (*row.samples, *row.frozen_samples)):
        raise ValueError(f"{where} has a sample that is no time: expected seconds above 0")
    if row.samples and len(row.samples) != len(row.frozen_samples):
        raise ValueError(
            f"{where} has {len(row.samples)} samples beside {len(row.frozen_samples)} of the frozen "
            "layer, expected as many"
        )
    return row.overhead


def _change(a: Summary, b: Summary) -> tuple[str, ...]:
    verdict = "slower" if b.low > a.high else "faster" if b.high < a.low else ""
    return (
        f"{a.median:.3f}", f"{a.low:.3f} – {a.high:.3f}",
        f"{b.median:.3f}", f"{b.low:.3f} – {b.high:.3f}",
        f"{b.median / a.median:.3f}", verdict,
    )  # fmt: skip
