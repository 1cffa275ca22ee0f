"""Renders what the README and ``docs/performance.md`` say of speed from the runs in ``bench/results/``.

    python bench/report.py            # rewrites the sections
    python bench/report.py --check    # exit status 1 if a section and the records disagree

A section stands between two marks. Of ``gpu-*`` and ``cpu-*`` the newest complete run of each device is
shown, or of a device that has none the newest one, of which it is said; of ``alone-*``, ``inference-*``,
``quantized-*``, ``networks-*``, ``preference-*``, ``distributed-*``, ``relatives-*``,
``accelerate-*``, ``traffic-*``, ``executed-*``, ``compiled-*`` and ``nvcc-*`` the newest one. No figure
is typed by hand.
"""

import argparse
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lorafast.bench.common.record import read
from lorafast.bench.common.table import markdown
from lorafast.bench.pages.counted import of_compiled, of_executed, of_nvcc, of_traffic
from lorafast.bench.pages.text import PERFORMANCE, ROOT, Run, base, relative, unique
from lorafast.bench.pages.timed import device_of, of_timed

from lorafast.bench import layer
from lorafast.core.problem import DENSE

README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
_DEVICES = ("gpu", "cpu")
_SHOWN = {"lorafast": "lorafast", "peft": "PEFT", "peft-compiled": "PEFT, compiled"}
_NO_GPU = "No run on a GPU is recorded yet."


@dataclass(frozen=True)
class Section:
    """A part of ``document``: what ``render`` makes of a folder of records, between two marks."""

    document: Path
    name: str
    render: Callable[[Path], str]
    inline: bool = False

    @property
    def begin(self) -> str:
        """The mark before it."""
        return f"<!-- {self.name}: rendered by bench/report.py from bench/results, not typed -->"

    @property
    def end(self) -> str:
        """The mark behind it."""
        return f"<!-- end of {self.name} -->"

    def of(self, text: str) -> str:
        """What stands between the marks in ``text``.

        Raises:
            ValueError: a mark is missing.

        """
        return self._cut(text)[1].strip()

    def put_into(self, text: str, rendered: str) -> str:
        """``text`` with ``rendered`` between the marks."""
        head, _, tail = self._cut(text)
        before, after = ("\n", " ") if self.inline else ("\n\n", "\n\n")
        return f"{head}{self.begin}{before}{rendered}{after}{self.end}{tail}"

    def _cut(self, text: str) -> tuple[str, str, str]:
        head, begin, rest = text.partition(self.begin)
        section, end, tail = rest.partition(self.end)
        if not (begin and end):
            raise ValueError(f"{self.document.name} lacks {self.begin!r} or {self.end!r}")
        return head, section, tail


def newest(results: Path, kind: str) -> dict[Path, Run]:
    """The newest complete run of a kind, of ``gpu`` and ``cpu`` that of each device. A device without
    one has the newest that broke off, if layers were measured in it."""
    found: dict[str, tuple[Path, Run]] = {}
    runs = [(path, read(path)) for path in sorted(results.glob(f"{kind}-*.json"))]
    for path, run in sorted(runs, key=lambda one: one[1]["started"]):
        of = run["machine"]["device"] if kind in _DEVICES else kind
        broke_off = kind in _DEVICES and bool(run.get("layer"))
        if run["complete"] or (broke_off and not (of in found and found[of][1]["complete"])):
            found[of] = path, run
    return dict(found.values())


def state(results: Path) -> str:
    """On which GPUs the kernels are timed, and for which they are compiled."""
    names = [run["machine"]["device"] for run in newest(results, "gpu").values()]
    compiled = [run for run in newest(results, "compiled").values() for run in run["compiled"]]
    targets = ", ".join(unique(str(row["capability"]) for row in compiled))
    others = (
        f"compiled (sm_{targets}) and executed on a CPU as PTX, not run" if targets else "not run"
    )
    page = f"[docs/{PERFORMANCE.name}](docs/{PERFORMANCE.name})"
    if names:
        said = f"**timed on {' and '.join(names)}** ({page}); for other GPUs they are {others}."
    else:
        said = f"**not yet timed on a GPU**: they are {others} ({page})."
    sentence = f"The GPU kernels are {said}"
    return textwrap.fill(sentence, 100, break_long_words=False, break_on_hyphens=False)


def speed(results: Path) -> str:
    """A line for each device, dtype and dropout: the overhead over all layers that were measured. Of
    quantized weights those that PEFT adapts too: the others are on the page of ``performance``."""
    groups: dict[tuple[str, float], list[layer.Row]] = {}
    commands = []
    for kind in _DEVICES:
        for path, run in newest(results, kind).items():
            rows = [layer.Row.from_json(row) for row in run.get("layer", ())]
            for row in rows:
                if row.which == "both":
                    kind_of_layer = f"{row.problem.dtype}{base(row.problem)}"
                    key = f"{device_of(run)}, {kind_of_layer}", row.problem.dropout_p
                    groups.setdefault(key, []).append(row)
            whole = "" if run["complete"] else " (broke off)"
            commands.append(f"[{device_of(run)}]({relative(path, README)}){whole}")
    shown = [
        name for name in _SHOWN if any(r.contender == name for g in groups.values() for r in g)
    ]
    lines = [
        [device, f"{dropout:g}", str(len(unique(row.problem for row in rows)))]
        + [_range(row for row in rows if row.contender == name) for name in shown]
        for (device, dropout), rows in groups.items()
        if rows[0].problem.base == DENSE or any(r.contender == "peft" and r.samples for r in rows)
    ]
    header = ["", "dropout", "layers", *(_SHOWN[name] for name in shown)]
    return f"{markdown(header, lines)}\n\nRecords: {', '.join(commands)}."


def _range(rows: Iterable[layer.Row]) -> str:
    """The median over layers of a contender's overhead, the least and the most."""
    found = list(rows)
    medians = [row.overhead.median for row in found if row.wrong is None and row.overhead]
    missing = f", {len(found) - len(medians)} not run" if len(medians) < len(found) else ""
    if not medians:
        return "not run" if found else ""
    low, high = min(medians), max(medians)
    return f"**{statistics.median(medians):.2f}** ({low:.2f} – {high:.2f}{missing})"


def performance(results: Path) -> str:
    """All records, a heading each."""
    parts = []
    kinds = (
        ("gpu", "", of_timed), ("cpu", "", of_timed),
        ("alone", "Without others beside it: ", of_timed), ("inference", "Inference: ", of_timed),
        ("quantized", "Quantized weights: ", of_timed),
        ("networks", "Convolutions and attention: ", of_timed),
        ("preference", "Policy and reference: ", of_timed),
        ("distributed", "Several ranks: ", of_timed),
        ("relatives", "LoRA's relatives and bottleneck adapters: ", of_timed),
        ("accelerate", "PEFT's models: ", of_timed), ("traffic", "", of_traffic),
        ("executed", "", of_executed), ("compiled", "", of_compiled),
        ("nvcc", "", of_nvcc),
    )  # fmt: skip
    for kind, heading, render_run in kinds:
        runs = newest(results, kind)
        for path, run in runs.items():
            if render_run is of_timed:
                parts.append(f"## {heading}{device_of(run)}")
            parts.append(render_run(path, run))
        if kind == "gpu" and not runs:
            parts.append(_NO_GPU)
    return "\n\n".join(parts)


SECTIONS = (
    Section(README, "state", state, inline=True),
    Section(README, "speed", speed),
    Section(PERFORMANCE, "performance", performance),
)


def main() -> int:
    """Rewrites or checks."""
    parser = argparse.ArgumentParser(
        description="Renders what README.md and docs/performance.md say of speed from bench/results."
    )
    parser.add_argument("--check", action="store_true", help="only compare")
    arguments = parser.parse_args()
    status = 0
    for section in SECTIONS:
        text, rendered = section.document.read_text(encoding="utf-8"), section.render(RESULTS)
        if section.of(text) == rendered:
            continue
        if arguments.check:
            print(
                f"{section.document.name} and bench/results disagree: run python bench/report.py",
                file=sys.stderr,
            )
            status = 1
        else:
            section.document.write_text(section.put_into(text, rendered), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
