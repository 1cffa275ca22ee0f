"""Renders the README's performance section from the recorded runs in ``bench/results/``.

    python bench/report.py            # rewrites the section
    python bench/report.py --check    # exit status 1 if the section and the records disagree

Of ``gpu-*``, ``cpu-*``, ``inference-*``, ``accelerate-*``, ``traffic-*`` and ``compiled-*`` the newest
complete run is shown. No figure is typed by hand.
"""

import argparse
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lorafast.bench.call_overhead import PASSES as CALLS
from lorafast.bench.common.clock import Summary
from lorafast.bench.common.contenders import FROZEN
from lorafast.bench.common.problem import PASSES, Problem
from lorafast.bench.common.record import read
from lorafast.bench.common.table import markdown, megabytes
from lorafast.bench.layer.report import duration

from lorafast.bench import accelerate, layer, models, traffic

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BEGIN = "<!-- performance: rendered by bench/report.py from bench/results, not typed -->"
END = "<!-- end of performance -->"
Run = dict[str, Any]
T = TypeVar("T")
_REMARKS = {"infer": ", again and again, so that code, and weights that fit, are in the cache"}


def render(results: Path = RESULTS) -> str:
    """The section, without its two marks."""
    parts = []
    kinds = (
        ("gpu", _section), ("cpu", _section), ("inference", _section), ("accelerate", _section),
        ("traffic", _traffic), ("compiled", _compiled),
    )  # fmt: skip
    for kind, render_run in kinds:
        runs = {path: read(path) for path in results.glob(f"{kind}-*.json")}
        complete = [path for path, run in runs.items() if run["complete"]]
        if complete:
            newest = max(complete, key=lambda path: runs[path]["started"])
            parts.append(render_run(newest, runs[newest]))
        elif kind == "gpu":
            parts.append("No run on a GPU is recorded yet.")
    return "\n\n".join(parts)


def on_a_gpu(run: Run) -> bool:
    """Whether a run was taken on a GPU."""
    return str(run["machine"]["capability"]).startswith("sm_")


def _section(path: Path, run: Run) -> str:
    machine = run["machine"]
    packages = machine["packages"]
    threads = "" if on_a_gpu(run) else f", {machine['threads']} threads"
    origin = (
        f"**{machine['device']}{threads}**, PyTorch {packages['torch']}, PEFT {packages['peft']}, "
        f"commit {machine['commit'] or 'unknown'}, {run['started'][:10]} "
        f"([record]({_relative(path)}), `{run['command']}`). Ratios to the frozen `nn.Linear` of the "
        "same round, median and middle half; *frozen again* is the frozen layer against itself, so the "
        "noise of the instrument."
    )
    parts = [origin]
    layers = [layer.Row.from_json(row) for row in run.get("layer", ())]
    for which in dict.fromkeys(row.which for row in layers):
        parts.append(f"{PASSES[which].capitalize()}{_REMARKS.get(which, '')}:")
        parts.append(_layers([row for row in layers if row.which == which]))
    picture = path.with_suffix(".png")
    if picture.is_file():
        parts.append(_picture(picture))
    calls = [layer.Row.from_json(row) for row in run.get("call_overhead", ())]
    if calls:
        shape = calls[0].problem.shape
        parts.append(
            f"A call where there is next to nothing to compute ({shape.K} × {shape.N}, {shape.M} rows, "
            f"r = {calls[0].problem.r}, {calls[0].problem.dtype}):"
        )
        parts.append(_calls(calls))
    steps = [models.Row(**row) for row in run.get("models", ())]
    for _, same in itertools.groupby(steps, key=lambda row: (row.model, row.dtype, row.r)):
        parts += _models(list(same))
    peft_models = [accelerate.Row(**row) for row in run.get("accelerate", ())]
    for _, of_peft in itertools.groupby(peft_models, key=lambda row: (row.dtype, row.r)):
        parts += _accelerated(list(of_peft))
    return "\n\n".join(parts)


def _layers(rows: Sequence[layer.Row]) -> str:
    """A line for each problem, a column for each contender."""
    contenders = [name for name in _unique(row.contender for row in rows) if name != FROZEN]
    lines = []
    for problem in _unique(row.problem for row in rows):
        by_name = {row.contender: row for row in rows if row.problem == problem}
        frozen = by_name[FROZEN].time
        lines.append(
            [
                _describe(problem),
                f"{problem.dropout_p:g}",
                "" if frozen is None else duration(frozen.median),
                f"{by_name['lorafast'].limit:.3f}",
                *(_overhead(by_name.get(name)) for name in contenders),
            ]
        )
    return markdown(["layer", "dropout", "frozen", "limit", *contenders], lines)


def _describe(problem: Problem) -> str:
    shape = problem.shape
    sizes = f"M={shape.M}, {shape.K} → {shape.N}, r={problem.r}, {problem.dtype}"
    return f"{shape.label}: {sizes}" if shape.label else sizes


def _overhead(row: layer.Row | models.Row | accelerate.Row | None) -> str:
    if row is None:
        return ""
    if row.wrong is not None:
        return "WRONG"
    return "not run" if row.overhead is None else _spread(row.overhead)


def _spread(summary: Summary) -> str:
    return f"**{summary.median:.3f}** ({summary.low:.3f} – {summary.high:.3f})"


def _calls(rows: Sequence[layer.Row]) -> str:
    contenders = _unique(row.contender for row in rows)
    lines = []
    for which in _unique(row.which for row in rows):
        cells = [CALLS[which]]
        by_name = {row.contender: row for row in rows if row.which == which}
        for name in contenders:
            row = by_name[name]
            if row.time is None or row.overhead is None:
                cells.append(_overhead(row))
            elif name == FROZEN:
                cells.append(f"{row.time.median * 1e6:.1f} µs")
            else:
                cells.append(f"{row.time.median * 1e6:.1f} µs (**{row.overhead.median:.2f}**)")
        lines.append(cells)
    return markdown(["", *contenders], lines)


def _models(rows: Sequence[models.Row]) -> list[str]:
    first = rows[0]
    lines = [
        [
            row.contender,
            "" if row.time is None else duration(row.time.median),
            _overhead(row),
            "" if row.time is None else f"{row.tokens / row.time.median:,.0f}",
            megabytes(row.peak_bytes),
        ]
        for row in rows
    ]
    return [
        f"A training step of a Llama of the sizes of {first.model} with random weights, "
        f"{first.layers} of its {first.all_layers} blocks, {first.tokens} tokens, {first.dtype}, "
        f"r = {first.r} on every linear layer (memory without weights):",
        markdown(["", "step", "overhead", "tokens/s", "peak MB"], lines),
    ]


def _accelerated(rows: Sequence[accelerate.Row]) -> list[str]:
    lines = []
    for model, case in _unique((row.model, row.case) for row in rows):
        of = {row.contender: row for row in rows if (row.model, row.case) == (model, case)}
        frozen, stock, fast = of[FROZEN], of["peft"], of["accelerated"]
        time, speedup = frozen.time, fast.speedup
        lines.append(
            [
                f"{model}, {case}, {fast.batch} × {fast.length} tokens",
                "" if time is None else duration(time.median),
                _overhead(stock),
                _overhead(fast),
                "" if speedup is None else _spread(speedup),
            ]
        )
    first = rows[0]
    return [
        "Whole models with PEFT's adapters, stock and after `lorafast.accelerate(model)` (a Llama of "
        f"random weights, four blocks of width 576; all-MiniLM-L6-v2), {first.dtype}, r = {first.r} on "
        "every linear layer; the last column is how much faster a step has become:",
        markdown(["step", "frozen", "peft", "accelerated", "peft / accelerated"], lines),
    ]


def _traffic(path: Path, run: Run) -> str:
    rows = [traffic.Row.from_json(row) for row in run["traffic"]]
    lines = [
        [
            _describe(row.problem) + f", {row.problem.adapter_dtype} adapter",
            f"{row.problem.dropout_p:g}",
            row.contender,
            f"{row.forward.launches} + {row.backward.launches}",
            f"{megabytes(row.forward.bytes)} + {megabytes(row.backward.bytes)}",
            f"{row.bytes / row.least:.2f}",
        ]
        for row in rows
        if row.wrong is None and row.unavailable is None
    ]
    header = ["layer", "dropout", "", "launches", "MB", "over the least"]
    riding = [
        f"{(row.bytes + row.ridden) / row.bytes:.2f}"
        for row in rows
        if row.ridden and row.wrong is None
    ]
    ridden = (
        "" if not riding else " What helper CTAs read beside a GEMM that reads it too counts once, as "
        "everything within a launch; if the cache kept none of it, `triton` would move "
        f"{' and '.join(_unique(riding))} times as much."
    )  # fmt: skip
    return (
        "Counted, not timed: launches and device-memory traffic of a forward and a backward on a GPU "
        "(`lorafast bench --traffic`, the same on every machine; "
        f"[record]({_relative(path)})). *The least* moves every operand once.{ridden}\n\n"
        + markdown(header, lines)
    )


def _compiled(path: Path, run: Run) -> str:
    lines = [
        [
            f"sm_{row['capability']}",
            f"`{row['kernel']}`",
            str(row["variants"]),
            str(row["registers"]),
            f"{row['shared']:,} of {row['shared_limit']:,}",
            str(row["spills"]),
            ", ".join(row["instructions"]),
        ]
        for row in run["compiled"]
    ]
    header = ["", "kernel", "variants", "registers", "shared memory", "spills", "multiplies with"]
    packages = run["machine"]["packages"]
    return (
        "Compiled, not run: what the machine code of every launch configuration in `kernels/tables` "
        f"needs at most, by Triton {packages['triton']} (`{run['command']}`, which the tests run and "
        f"which prints a line for each variant; [record]({_relative(path)})).\n\n"
        + markdown(header, lines)
    )


def _picture(path: Path) -> str:
    light, dark = _relative(path), _relative(path.with_name(f"{path.stem}-dark.png"))
    return (
        "<picture>\n"
        f'  <source media="(prefers-color-scheme: dark)" srcset="{dark}">\n'
        f'  <img alt="overhead against M and against r" src="{light}">\n'
        "</picture>"
    )


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def _unique(items: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(items))


def section_of(text: str) -> str:
    """What stands between the two marks of a README."""
    _, _, rest = text.partition(BEGIN)
    section, end, _ = rest.partition(END)
    if not end:
        raise ValueError(f"the README lacks {BEGIN!r} or {END!r}")
    return section.strip()


def main() -> int:
    """Rewrites or checks."""
    parser = argparse.ArgumentParser(
        description="Renders the README's performance section from bench/results."
    )
    parser.add_argument("--check", action="store_true", help="only compare")
    arguments = parser.parse_args()
    text, rendered = README.read_text(encoding="utf-8"), render()
    before = section_of(text)
    if arguments.check:
        if before != rendered:
            print(
                "README.md and bench/results disagree: run python bench/report.py", file=sys.stderr
            )
        return int(before != rendered)
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(f"{head}{BEGIN}\n\n{rendered}\n\n{END}{tail}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
