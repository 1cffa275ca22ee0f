"""What is timed: layers, operations, calls, steps of models and of networks."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from lorafast.bench.call_overhead import PASSES as CALLS
from lorafast.bench.common.clock import Summary
from lorafast.bench.common.contenders import FROZEN
from lorafast.bench.common.problem import PASSES
from lorafast.bench.common.record import rows_of
from lorafast.bench.common.steps import paragraphs
from lorafast.bench.common.table import markdown, megabytes, why_no_time
from lorafast.bench.layer.report import duration
from lorafast.bench.operations.job import COPY, PRODUCT
from lorafast.bench.pages.text import Run, describe, picture, relative, unique

from lorafast.bench import (
    accelerate,
    attention,
    bottlenecks,
    convolutions,
    distributed,
    layer,
    models,
    operations,
    preference,
    relatives,
)
from lorafast.core.problem import DENSE

_REMARKS = {"infer": ", again and again, so that code, and weights that fit, are in the cache"}
_BROKE_OFF = "The run broke off: this is what it had measured."


def on_a_gpu(run: Run) -> bool:
    """Whether a run was taken on a GPU."""
    return str(run["machine"]["capability"]).startswith("sm_")


def of_timed(path: Path, run: Run) -> str:
    """Layers, then operations, calls, steps; the command and what it was taken with before them."""
    machine = run["machine"]
    packages = machine["packages"]
    triton = f", Triton {packages['triton']}" if on_a_gpu(run) else ""
    parts = [
        f"PyTorch {packages['torch']}{triton}, PEFT {packages['peft']}, commit "
        f"{machine['commit'] or 'unknown'}, {run['started'][:10]} ([record]({relative(path)})):",
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
    drawn = path.with_suffix(".png")
    if drawn.is_file():
        swept = "overhead against M and against r"
        parts.append(picture(drawn, "overhead of each kind" if "relatives" in run else swept))
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
    parts += relatives.paragraphs(rows_of(run, "relatives", relatives.Row, path))
    for kind in (bottlenecks, convolutions, attention, preference):
        name = kind.__name__.rpartition(".")[2]
        parts += paragraphs(rows_of(run, name, kind.Row, path), kind.describe)
    parts += _distributed(rows_of(run, "distributed", distributed.Row, path))
    peft_models = [accelerate.Row(**row) for row in run.get("accelerate", ())]
    for _, of_peft in itertools.groupby(peft_models, key=lambda row: (row.dtype, row.r)):
        parts += _accelerated(list(of_peft))
    return "\n\n".join(parts)


def _distributed(rows: Sequence[distributed.Row]) -> list[str]:
    """A table for each layout, and below it what each arm sends."""
    found = []
    for _, same in itertools.groupby(rows, key=distributed.describe):
        layout = list(same)
        found += paragraphs(layout, distributed.describe)
        sent = [f"{row.contender} {distributed.sent_by(row)}" for row in layout if row.samples]
        found.append(f"A rank sends: {'; '.join(sent)}.")
    return found


def device_of(run: Run) -> str:
    """The name of what a run was taken on, of a processor with its threads."""
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
    contenders = [name for name in unique(row.contender for row in rows) if name != FROZEN]
    lines = []
    for problem in unique(row.problem for row in rows):
        by_name = {row.contender: row for row in rows if row.problem == problem}
        frozen = by_name[FROZEN].time
        lines.append(
            [
                describe(problem),
                f"{problem.dropout_p:g}",
                "" if frozen is None else duration(frozen.median),
                f"{by_name['lorafast'].limit:.3f}",
                *(_overhead(by_name.get(name)) for name in contenders),
            ]
        )
    return markdown(["layer", "dropout", "frozen", "limit", *contenders], lines)


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
        f"Operations by themselves, {describe(problem)}, {dropout}:",
        markdown(["operation", "backend", "time", "TFLOP/s", "GB/s"], lines),
    ]


def _calls(rows: Sequence[layer.Row]) -> str:
    contenders = unique(row.contender for row in rows)
    lines = []
    for which in unique(row.which for row in rows):
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
    for model, case in unique((row.model, row.case) for row in rows):
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
