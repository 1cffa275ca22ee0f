"""Renders what the README and ``docs/performance.md`` say of speed from the runs in ``bench/results/``.

    python bench/report.py            # rewrites the sections
    python bench/report.py --check    # exit status 1 if a section and the records disagree

A section stands between two marks. Of ``gpu-*`` and ``cpu-*`` the newest complete run of each device is
shown, or of a device that has none the newest one, of which it is said; of ``inference-*``,
``quantized-*``, ``networks-*``, ``accelerate-*``, ``traffic-*``, ``executed-*``, ``compiled-*`` and
``nvcc-*`` the newest one. No figure is typed by hand.
"""

import argparse
import itertools
import os
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lorafast.bench.call_overhead import PASSES as CALLS
from lorafast.bench.common.clock import Summary
from lorafast.bench.common.contenders import FROZEN
from lorafast.bench.common.problem import PASSES, Problem
from lorafast.bench.common.record import read, rows_of
from lorafast.bench.common.steps import paragraphs
from lorafast.bench.common.table import markdown, megabytes, why_no_time
from lorafast.bench.layer.report import duration
from lorafast.bench.operations.job import COPY, PRODUCT

from lorafast.bench import (
    accelerate,
    attention,
    convolutions,
    executed,
    layer,
    models,
    operations,
    traffic,
)  # fmt: skip
from lorafast.core.problem import DENSE

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "bench" / "results"
Run = dict[str, Any]
T = TypeVar("T")
_REMARKS = {"infer": ", again and again, so that code, and weights that fit, are in the cache"}
_DEVICES = ("gpu", "cpu")
_SHOWN = {"lorafast": "lorafast", "peft": "PEFT", "peft-compiled": "PEFT, compiled"}
_BROKE_OFF = "The run broke off: this is what it had measured."
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
    targets = ", ".join(_unique(str(row["capability"]) for row in compiled))
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
                    kind_of_layer = f"{row.problem.dtype}{_base(row.problem)}"
                    key = f"{_device(run)}, {kind_of_layer}", row.problem.dropout_p
                    groups.setdefault(key, []).append(row)
            whole = "" if run["complete"] else " (broke off)"
            commands.append(f"[{_device(run)}]({_relative(path, README)}){whole}")
    shown = [
        name for name in _SHOWN if any(r.contender == name for g in groups.values() for r in g)
    ]
    lines = [
        [device, f"{dropout:g}", str(len(_unique(row.problem for row in rows)))]
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
        ("gpu", "", _section), ("cpu", "", _section), ("inference", "Inference: ", _section),
        ("quantized", "Quantized weights: ", _section),
        ("networks", "Convolutions and attention: ", _section),
        ("accelerate", "PEFT's models: ", _section), ("traffic", "", _traffic),
        ("executed", "", _executed), ("compiled", "", _compiled),
        ("nvcc", "", _nvcc),
    )  # fmt: skip
    for kind, heading, render_run in kinds:
        runs = newest(results, kind)
        for path, run in runs.items():
            if render_run is _section:
                parts.append(f"## {heading}{_device(run)}")
            parts.append(render_run(path, run))
        if kind == "gpu" and not runs:
            parts.append(_NO_GPU)
    return "\n\n".join(parts)


SECTIONS = (
    Section(README, "state", state, inline=True),
    Section(README, "speed", speed),
    Section(PERFORMANCE, "performance", performance),
)


def on_a_gpu(run: Run) -> bool:
    """Whether a run was taken on a GPU."""
    return str(run["machine"]["capability"]).startswith("sm_")


def _section(path: Path, run: Run) -> str:
    machine = run["machine"]
    packages = machine["packages"]
    triton = f", Triton {packages['triton']}" if on_a_gpu(run) else ""
    parts = [
        f"PyTorch {packages['torch']}{triton}, PEFT {packages['peft']}, commit "
        f"{machine['commit'] or 'unknown'}, {run['started'][:10]} ([record]({_relative(path)})):",
        f"```sh\n{_command(run)}\n```",
    ]
    if not run["complete"]:
        parts.append(_BROKE_OFF)
    parts += [_tests(row) for row in run.get("tests", ())]
    layers = [layer.Row.from_json(row) for row in run.get("layer", ())]
    for which in dict.fromkeys(row.which for row in layers):
        parts.append(f"{PASSES[which].capitalize()}{_REMARKS.get(which, '')}:")
        parts.append(_layers([row for row in layers if row.which == which]))
    decoded = [layer.Row.from_json(row) for row in run.get("decode", ())]
    if decoded:
        parts.append("A decode step, in inference mode:")
        parts.append(_layers(decoded))
    picture = path.with_suffix(".png")
    if picture.is_file():
        parts.append(_picture(picture))
    ops = rows_of(run, "operations", operations.Row, path)
    for _, same in itertools.groupby(ops, key=lambda row: row.problem):
        parts += _operations(list(same))
    calls = [layer.Row.from_json(row) for row in run.get("call_overhead", ())]
    if calls:
        shape = calls[0].problem.shape
        parts.append(
            f"A call where there is next to nothing to compute ({shape.K} × {shape.N}, {shape.M} rows, "
            f"r = {calls[0].problem.r}, {calls[0].problem.dtype}):"
        )
        parts.append(_calls(calls))
    steps = [models.Row(**row) for row in run.get("models", ())]
    for _, step in itertools.groupby(
        steps, key=lambda row: (row.model, row.dtype, row.r, row.base)
    ):
        parts += _models(list(step))
    for kind in (convolutions, attention):
        name = kind.__name__.rpartition(".")[2]
        parts += paragraphs(rows_of(run, name, kind.Row, path), kind.describe)
    peft_models = [accelerate.Row(**row) for row in run.get("accelerate", ())]
    for _, of_peft in itertools.groupby(peft_models, key=lambda row: (row.dtype, row.r)):
        parts += _accelerated(list(of_peft))
    return "\n\n".join(parts)


def _device(run: Run) -> str:
    machine = run["machine"]
    threads = "" if on_a_gpu(run) else f", {machine['threads']} threads"
    return f"{machine['device']}{threads}"


def _command(run: Run) -> str:
    """As it is typed: ``make`` takes options of its own only."""
    command: str = run["command"]
    options = command.removeprefix("make gpu ")
    return command if options == command else f'make gpu ARGS="{options}"'


def _tests(row: dict[str, int]) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in row.items() if name != "status")
    return f"Tests on the device in the same run: {counts or 'none'}."


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
    r = f"r={problem.r}{', DoRA' * problem.use_dora}"
    sizes = f"M={shape.M}, {shape.K} → {shape.N}, {r}, {problem.dtype}{_base(problem)}"
    return f"{shape.label}: {sizes}" if shape.label else sizes


def _base(problem: Problem) -> str:
    return "" if problem.base == DENSE else f", {problem.base} base"


def _overhead(row: layer.Row | models.Row | accelerate.Row | None) -> str:
    if row is None:
        return ""
    if row.wrong is not None:
        return "WRONG"
    return "not run" if row.overhead is None else _spread(row.overhead)


def _spread(summary: Summary) -> str:
    return f"**{summary.median:.3f}** ({summary.low:.3f} – {summary.high:.3f})"


def _operations(rows: Sequence[operations.Row]) -> list[str]:
    problem = rows[0].problem
    lines = []
    for row in rows:
        cells = [row.case, row.contender]
        if row.samples:
            time = Summary.of(row.samples)
            cells += [
                duration(time.median),
                f"{row.flops / time.median / 1e12:.3g}",
                f"{row.least_bytes / time.median / 1e9:,.0f}",
            ]
        else:
            cells += [why_no_time(row.wrong, row.unavailable) or "not run", "", ""]
        lines.append(cells)
    timed = next((row for row in rows if row.copy_samples), None)
    if timed is not None:
        M, K, N = problem.shape.M, problem.shape.K, problem.shape.N
        copy, gemm = Summary.of(timed.copy_samples).median, Summary.of(timed.product_samples).median
        copied = 2 * M * K * problem.element_size
        lines.append([COPY, "", duration(copy), "", f"{copied / copy / 1e9:,.0f}"])
        lines.append([PRODUCT, "", duration(gemm), f"{2 * M * K * N / gemm / 1e12:.3g}", ""])
    dropout = f"dropout {problem.dropout_p:g}" if problem.dropout_p else "no dropout"
    return [
        f"Operations by themselves, {_describe(problem)}, {dropout}:",
        markdown(["operation", "backend", "time", "TFLOP/s", "GB/s"], lines),
    ]


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
            *([megabytes(row.weights_bytes)] if first.base != DENSE else []),
        ]
        for row in rows
    ]
    quantized = first.base != DENSE
    base = f", {first.base} base (the frozen model's dense)" if quantized else ""
    weights = ["weights MB"] if quantized else []
    return [
        f"A training step of a Llama of the sizes of {first.model} with random weights, "
        f"{first.layers} of its {first.all_layers} blocks, {first.tokens} tokens, {first.dtype}{base}, "
        f"r = {first.r} on every linear layer (memory without weights):",
        markdown(["", "step", "overhead", "tokens/s", "peak MB", *weights], lines),
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
    frozen = {row.problem: row.bytes for row in rows if row.contender == FROZEN}
    quantized = any(row.problem.base != DENSE for row in rows)
    lines = [
        [
            _describe(row.problem) + f", {row.problem.adapter_dtype} adapter",
            f"{row.problem.dropout_p:g}",
            row.contender,
            f"{row.forward.launches} + {row.backward.launches}",
            f"{megabytes(row.forward.bytes)} + {megabytes(row.backward.bytes)}",
            *([f"{row.bytes / frozen[row.problem]:.2f}"] if quantized else []),
            f"{row.bytes / row.least:.2f}",
        ]
        for row in rows
        if row.wrong is None and row.unavailable is None
    ]
    of_frozen = ["over the frozen"] if quantized else []
    header = ["layer", "dropout", "", "launches", "MB", *of_frozen, "over the least"]
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
        "## Traffic, counted\n\n"
        "Counted, not timed: launches and device-memory traffic of a forward and a backward on a GPU "
        "(`lorafast bench --traffic`, the same on every machine; "
        f"[record]({_relative(path)})). *The least* moves every operand once.{ridden}\n\n"
        + "\n\n".join([markdown(header, lines), *_of_convolutions(run)])
    )


def _of_convolutions(run: Run) -> list[str]:
    rows = [traffic.convolutions.Row.from_json(row) for row in run.get("traffic_convolutions", ())]
    return traffic.convolutions.paragraphs(rows)


def _executed(path: Path, run: Run) -> str:
    every = [executed.Row(**row) for row in run["executed"]]
    pairs = executed.beside(every)
    rows = executed.alone(every, pairs)
    lines = [
        [
            f"sm_{row.capability}", f"`{row.name}`", _layer_of(row),
            *(f"{row.cycles[unit] / 1000:.1f}" for unit in executed.UNITS), row.bound,
            f"{row.issued_per_multiply:.2f}", f"{row.step['conflicts']:.0f}",
            f"{row.in_flight / 1024:.0f}", f"{row.registers}",
        ]
        for row in rows
    ]  # fmt: skip
    header = [
        "", "kernel", "layer", *executed.UNITS, "bound by", "issued a multiply", "conflicts",
        "KB in flight", "registers",
    ]  # fmt: skip
    return (
        "## What kernels execute, counted\n\n"
        "Executed, not timed: the PTX of our Triton kernels is run instruction by instruction on a CPU, "
        f"and counted (`{run['command']}`, the same on every machine; [record]({_relative(path)})). "
        "*tensor*, *issue*, *shared* and *memory* are thousands of cycles of an SM for a tile of a GEMM "
        "or a program of a skinny kernel, or an item of helpers: what each unit takes alone, at its "
        "full rate; memory is L2 for a GEMM and beside it, device memory else. *issued a multiply*: "
        "instructions of warps in the main loop "
        "for each 16 × 8 × 16 multiply-adds. *conflicts*: passes over the banks of shared memory "
        "in a step beyond the least.\n\n"
        + markdown(header, lines)
        + _beside(pairs, run)
        + _gemms(every)
    )


def _layer_of(row: executed.Row) -> str:
    if not row.N:
        return f"{row.M} × {row.K}"
    return f"{row.M} × {row.K} → {row.N}, r = {row.r}"


def _beside(pairs: Sequence[tuple[executed.Row, list[executed.Row]]], run: Run) -> str:
    """The kernels of csrc/cuda beside Triton's, a table an architecture; or why they aren't there."""
    said = [row["reason"] for row in run.get("executed_without", ())]
    if said:
        return "\n\n" + " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in said)
    if not pairs:
        return ""
    header = [
        "kernel", "layer", *executed.LAUNCH_UNITS, "bound by", "issued a multiply", "moved",
        "conflicts", "KB in flight", "registers", "launches",
    ]  # fmt: skip
    parts = [
        "\n\n### CUDA C++ beside Triton, executed, not timed",
        "A cell has the kernel of `csrc/cuda`, then Triton's; – is what there is none of. Thousands "
        "of cycles of the whole launch, each unit alone at its full rate: *tensor*, *issue*, *shared* "
        "and *L2*, by which all sectors come, of an SM that has the most tiles; *memory* of the whole "
        "device, for operands and results once, or for what was counted. *moved*: bytes in sectors, by "
        "what operands and results are; what is read again comes from L2. `lora_linear` stands beside "
        "Triton's `shrink` and `linear_expand`: cycles and bytes are of both, the other cells of each. "
        "*launches*: of the operation, of which the first is counted.",
    ]
    decoded = [row for row, _ in pairs if row.from_memory]
    if decoded:
        parts.append(_decoding(decoded))
    for capability, of in itertools.groupby(pairs, key=lambda pair: pair[0].capability):
        lines = [
            [f"`{row.name}`", _layer_of(row), *executed.beside_cells(row, triton)]
            for row, triton in of
        ]
        parts.append(f"sm_{capability}{'a' if capability == 90 else ''}:")
        parts.append(markdown(header, lines))
    return "\n\n".join(parts)


def _gemms(rows: Sequence[executed.Row]) -> str:
    """Tiles of the GEMMs of csrc/cuda, each beside the one without a low-rank term."""
    tiles = executed.gemms(rows)
    if not tiles:
        return ""
    lines = [
        [f"sm_{row.capability}", f"`{row.name}`", _layer_of(row), *executed.gemm_cells(row, plain)]
        for row, plain in tiles
    ]
    return "\n\n".join([
        "\n\n### Tiles of CUDA C++ GEMMs, counted and modelled",
        "*tensor / issued / stalls a step*: cycles of tensor cores, cycles in which four "
        "schedulers issue the instructions of all warps, and the stalls that ptxas gives one "
        "warp. *L2 bytes a clock*: of an SM while tensor cores are busy. *beside*: cycles of a "
        "tile beside its steps, by unit. *stalls after*: of a warp from its last product to its "
        "last store. *added*: by the low-rank term to a tile of the same GEMM without it "
        "(`plain`): by the unit that takes longest, for `wgmma` by the timeline. "
        "*tensor-bound*: the share of a tile's clocks in which tensor cores multiply, by that "
        "timeline, a model of the CTA's warps (`tests/cuda/timeline.py`): instructions are "
        "counted, latencies assumed, nothing is timed. *idle most*: what tensor cores wait for "
        "most, in clocks of a tile. A fused backward has the tile of dx. A masked dx that takes "
        "other tiles than a plain one has nothing to be added to. Triton's tiles are in the table "
        "before: they are the same for every layer of this K, so those of r = 64 and of 14336 "
        "outputs aren't counted again.",
        markdown(["", "kernel", "layer", *executed.GEMM_HEADER[2:]], lines),
    ])  # fmt: skip


def _decoding(rows: Sequence[executed.Row]) -> str:
    """The bytes that a layer of few rows moves from and to device memory, by those of W."""
    said = []
    for N, K, r in _unique((row.N, row.K, row.r) for row in rows):
        of = [row for row in rows if (row.N, row.K, row.r) == (N, K, r)]
        most = max(row.from_memory / (2.0 * N * K) for row in of)
        adapter = r * (N + K) / (N * K)
        said.append(f"{most:.4f} for {K} → {N} at r = {r}, where A and B are {adapter:.4f}")
    return (
        "Decoding is one launch, and moves at most this many times the bytes of W from and to memory: "
        f"{'; '.join(said)}. W, A and B are counted as often as they are loaded, A once where each CTA "
        "makes its own s (the rest comes from L2), x and y once."
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
        "## Machine code, compiled\n\n"
        "Compiled, not run: what the machine code of every launch configuration in `kernels/tables` "
        f"needs at most, by Triton {packages['triton']} (`{run['command']}`, which the tests run and "
        f"which prints a line for each variant; [record]({_relative(path)})).\n\n"
        + markdown(header, lines)
    )


def _nvcc(path: Path, run: Run) -> str:
    lines = [
        [
            row["arch"], f"`{row['kernel']}`", str(row["instances"]), str(row["registers"]),
            f"{row['shared']:,}", str(row["spills"]), ", ".join(row["instructions"]),
        ]
        for row in run["nvcc"]
    ]  # fmt: skip
    header = [
        "", "kernel", "instances", "registers", "static shared memory", "spills", "multiplies with",
    ]  # fmt: skip
    versions = ", ".join(_unique(row["nvcc"] for row in run["nvcc"]))
    return (
        "## Machine code of csrc/cuda\n\n"
        f"Compiled by nvcc {versions}, not run: what the instances of each kernel need at most "
        f"(`{run['command']}`; [record]({_relative(path)})).\n\n" + markdown(header, lines)
    )


def _picture(path: Path) -> str:
    light, dark = _relative(path), _relative(path.with_name(f"{path.stem}-dark.png"))
    return (
        "<picture>\n"
        f'  <source media="(prefers-color-scheme: dark)" srcset="{dark}">\n'
        f'  <img alt="overhead against M and against r" src="{light}">\n'
        "</picture>"
    )


def _relative(path: Path, document: Path = PERFORMANCE) -> str:
    """A record's path as a link of ``document``."""
    inside = path.is_relative_to(ROOT)
    return Path(os.path.relpath(path, document.parent)).as_posix() if inside else path.name


def _unique(items: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(items))


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
