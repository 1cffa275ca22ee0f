"""Tests on the device, tunes, benchmarks, records.

    make gpu                              # python -m lorafast.bench.gpu
    LORAFAST_OUT=/tmp/out make gpu

Leaves ``gpu-<name>-<date>.json``, a log, the plots and what was tuned (``tuned-<name>.json``, from
which rows go into ``kernels/tables``) in the folder that ``LORAFAST_OUT`` names (default
``bench/results``). The record is written whenever something is added to it. Exit status: 0, 1 if a test
failed or a contender was wrong, 2 without a GPU, 130 after Ctrl-C.
"""

import argparse
import contextlib
import datetime
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from lorafast.bench.accelerate import CASES, Case
from lorafast.bench.accelerate import run as run_accelerated
from lorafast.bench.call_overhead import run as run_call_overhead
from lorafast.bench.common import machine, output
from lorafast.bench.common.contenders import BUILDERS
from lorafast.bench.common.problem import Problem
from lorafast.bench.common.record import Record
from lorafast.bench.common.shapes import MODELS, Shape
from lorafast.bench.models import run as run_model
from lorafast.bench.operations import run as run_operations

from lorafast.bench import layer, traffic, tune
from lorafast.operands import FP8, NF4, Int8

_SUMMARY = "Tests on the device, tunes, benchmarks, records."
_ROOT = Path(__file__).resolve().parents[2]
_BROKE = "broke"
_TESTS, _TUNE = "tests", "tune"
SKIPPABLE = (_TESTS, _TUNE)
"""Stages that other stages don't need."""
_MOST_WORKERS = 12
_BACKENDS = ("aten", "triton", "cuda")
"""Those that serve a GPU; one that can't be used is named with its reason."""


@dataclass
class _Plan:
    """What the stages measure, and where."""

    device: torch.device
    table: list[Problem]
    square: Problem
    dropped: Problem
    quantized: list[Problem]
    against: tuple[str, ...]
    swept: list[Problem]
    decoded: list[Problem]
    decoded_by: tuple[str, ...]
    model: str
    model_layers: int | None
    tune_seconds: float
    share_of_time: float
    """Of the seconds for which the other stages time a problem."""
    tokens: int
    peft_cases: Sequence[Case]


def _plan_for_gpu(device: torch.device) -> _Plan:
    """Llama's shapes; the table is the one that the project's goals are stated in."""
    square = Shape("llama-8b q,o", 8192, 4096, 4096)
    shapes = (
        (square, 16),
        (Shape("llama-8b gate,up", 8192, 4096, 14336), 16),
        (square, 64),
        (Shape("llama-70b q,o", 8192, 8192, 8192), 16),
        (Shape("llama-8b k,v", 8192, 4096, 1024), 16),
        (Shape("llama-8b q,o", 512, 4096, 4096), 16),
    )
    table = [Problem(shape, r, "bf16", "fp32", p) for shape, r in shapes for p in (0.0, 0.05)]
    return _Plan(
        device, table, square=table[0], dropped=table[1],
        quantized=_over(table[:2], NF4.format) + _over(table[:1], Int8.format, FP8.format),
        against=("peft", "peft-compiled", *_BACKENDS, "frozen"),
        swept=layer.sweep(table[0], "cuda"),
        decoded=_decoded(square, (1, 16)) + _over(_decoded(square, (1, 16)), NF4.format),
        decoded_by=("peft", *_BACKENDS),
        model="llama-8b", model_layers=None,
        tune_seconds=12.0, share_of_time=1.0, tokens=8192, peft_cases=CASES,
    )  # fmt: skip


def _plan_for_rehearsal() -> _Plan:
    """The same stages on the CPU, kernels interpreted, so small that a minute or two does."""
    table = [Problem(Shape("tiny", 40, 48, 56), 4, "bf16", "fp32", p) for p in (0.0, 0.05)]
    other = Problem(Shape("tiny", 20, 48, 56), 8, "bf16", "fp32", 0.0)
    whole = Shape("tiny", 40, 64, 56)  # rows of whole blocks, as bitsandbytes needs them on a CPU
    quantized = _over([Problem(whole, 4, "bf16", "fp32", p) for p in (0.0, 0.05)], NF4.format)
    return _Plan(
        torch.device("cpu"), table, square=table[0], dropped=table[1], quantized=quantized,
        against=("peft", *_BACKENDS, "frozen"), swept=[table[0], other],
        # Without Triton: inference is timed by many calls, of which each takes the interpreter long.
        decoded=_decoded(table[0].shape, (1,)), decoded_by=("peft", "aten", "cuda"),
        model="qwen-0.6b", model_layers=1,
        tune_seconds=0.5, share_of_time=0.05, tokens=8, peft_cases=CASES[-1:],
    )  # fmt: skip


def _decoded(shape: Shape, Ms: Sequence[int]) -> list[Problem]:
    """The layer on so few rows as generation has."""
    return [Problem(replace(shape, M=M), 16, "bf16", "fp32", 0.0) for M in Ms]


def _over(problems: Sequence[Problem], *bases: str) -> list[Problem]:
    """The same layers over quantized weights."""
    return [replace(problem, base=base) for base in bases for problem in problems]


@dataclass
class _Budget:
    """The time for all stages. A stage begins only before its share of it is used up, and takes no new
    problem after that; what it has begun it ends."""

    start: float
    total: float

    def until(self, share: float) -> float:
        """The moment of ``time.monotonic`` at which ``share`` of the time is used."""
        return self.start + share * self.total

    def left(self, share: float) -> float:
        """Seconds until then, at least ten."""
        return max(self.until(share) - time.monotonic(), 10.0)


@dataclass
class _Stage:
    """A job that must begin before ``share`` of the time is used; a sentence it returns is a failure."""

    name: str
    share: float
    run: Callable[[], object]


def main(words: Sequence[str] | None = None) -> int:
    """Runs every stage."""
    parser = argparse.ArgumentParser(prog="make gpu", description=_SUMMARY)
    parser.add_argument("--minutes", type=float, default=8.5, help="for all of it (default: 8.5)")
    parser.add_argument(
        "--skip", action="append", choices=SKIPPABLE, default=[], help="leave a stage out"
    )
    parser.add_argument(
        "--without", action="append", choices=sorted(BUILDERS), default=[], metavar="CONTENDER",
        help="leave a contender out of the layers",
    )  # fmt: skip
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU at tiny sizes: tries the command itself"
    )
    arguments = parser.parse_args(words)
    if not 0 < arguments.minutes < float("inf"):
        parser.error(f"--minutes is {arguments.minutes}, expected a positive number")
    if arguments.rehearse:
        # Before the kernels are first imported, which is when Triton reads it.
        os.environ["TRITON_INTERPRET"] = "1"
        plan = _plan_for_rehearsal()
    elif torch.cuda.is_available():
        plan = _plan_for_gpu(torch.device("cuda", torch.cuda.current_device()))
    else:
        print("make gpu needs an NVIDIA GPU, and PyTorch sees none here", file=sys.stderr)
        return 2
    name = re.sub(r"[^a-z0-9]+", "-", machine.device_name(plan.device).lower()).strip("-")
    kind = "rehearsal" if arguments.rehearse else "gpu"
    stem = f"{kind}-{name}-{datetime.date.today().isoformat()}"
    folder = Path(os.environ.get("LORAFAST_OUT") or _ROOT / "bench" / "results").resolve()
    path = _unused(folder, stem)
    try:
        output.check(path)
    except output.UnwritableError as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    os.environ["LORAFAST_CACHE"] = str(folder)
    plan.against = tuple(name for name in plan.against if name not in arguments.without)
    budget = _Budget(time.monotonic(), 60 * arguments.minutes)
    command = ["make", "gpu", *(sys.argv[1:] if words is None else words)]
    with _log_to(path.with_suffix(".log")):
        record = Record(plan.device, command, path)
        print(f"{machine.device_name(plan.device)}, {record.summary()}")
        if record.commit is None:
            print("the commit is unknown here: LORAFAST_COMMIT=<hash> puts it on record")
        failed: list[str] = []
        interrupted = False
        try:
            for stage in _stages(plan, budget, record, arguments):
                failed += _run(stage, budget, record)
        except KeyboardInterrupt:
            interrupted = True
            print("\ninterrupted: what was done is kept")
        broke = any(sentence.endswith(_BROKE) for sentence in failed)
        record.finish(complete=not (broke or interrupted))
        for drawn in _plot(record, path.with_suffix(".png")):
            print(f"drawn: {drawn}")
        print(f"recorded in {path} in {time.monotonic() - budget.start:.0f} s")
        if record.any_wrong():
            failed.append("a contender was WRONG, see above")
        for sentence in failed:
            print(f"FAILED: {sentence}")
    return 130 if interrupted else int(bool(failed))


def _unused(folder: Path, stem: str) -> Path:
    """The record's path; a second one of a day is numbered."""
    path = folder / f"{stem}.json"
    number = 2
    while path.exists():
        path = folder / f"{stem}-{number}.json"
        number += 1
    return path


def _stages(
    plan: _Plan, budget: _Budget, record: Record, arguments: argparse.Namespace
) -> list[_Stage]:
    device, both, part = plan.device, [plan.square, plan.dropped], plan.share_of_time
    stages = [
        _Stage(_TESTS, 0.1, lambda: _test(record, budget.left(0.35))),
        _Stage("operations", 0.4, lambda: run_operations(
            both, _BACKENDS,
            device=device, seconds=part * 0.3, record=record, deadline=budget.until(0.4),
        )),
        # Before what uses it.
        _Stage(_TUNE, 0.6, lambda: tune.run(
            [plan.square], device=device, seconds=plan.tune_seconds, record=record,
            deadline=budget.until(0.6),
        )),
        _Stage("layers", 0.7, lambda: layer.run(
            plan.table, ["both"], plan.against,
            device=device, seconds=part * 0.7, record=record, deadline=budget.until(0.7),
        )),
        _Stage("quantized layers", 0.79, lambda: layer.run(
            plan.quantized, ["both"], plan.against,
            device=device, seconds=part * 0.5, record=record, deadline=budget.until(0.79),
        )),
        _Stage("sweep", 0.87, lambda: layer.run(
            plan.swept, ["both"], ["peft", *_BACKENDS],
            device=device, seconds=part * 0.4, record=record, kind="sweep", deadline=budget.until(0.87),
        )),
        _Stage("decoding", 0.88, lambda: layer.run(
            plan.decoded, ["infer"], plan.decoded_by,
            device=device, seconds=part * 0.4, record=record, kind="decode", deadline=budget.until(0.88),
        )),
        _Stage("call overhead", 0.89, lambda: run_call_overhead(
            ["peft"], device=device, record=record
        )),
        _Stage("model", 0.9, lambda: run_model(
            MODELS[plan.model], 16, "bf16", ["peft"], device=device, record=record,
            layers=plan.model_layers, tokens=plan.tokens, seconds=part * 5.0,
        )),
        _Stage("PEFT's layers, accelerated", 0.92, lambda: run_accelerated(
            ["tiny-llama"], 16, "bf16", device=device, record=record, seconds=part * 1.0,
            cases=plan.peft_cases,
        )),
        _Stage("traffic", 0.95, lambda: traffic.run(
            [*both, *_over(both, NF4.format)], ["peft", "aten", "triton"], record=record
        )),
    ]  # fmt: skip
    return [stage for stage in stages if stage.name not in arguments.skip]


def _run(stage: _Stage, budget: _Budget, record: Record) -> list[str]:
    """What failed in a stage; one that breaks is reported and does not stop the others."""
    print(f"\n== {stage.name} ({time.monotonic() - budget.start:.0f} s)", flush=True)
    if time.monotonic() > budget.until(stage.share):
        print("not begun, the time is up")
        record.skip(stage.name)
        return []
    try:
        problem = stage.run()
        torch.cuda.empty_cache()
    except Exception:  # the other stages still tell something, and this one is reported
        traceback.print_exc(file=sys.stdout)
        problem = f"{stage.name} {_BROKE}"
    return [problem] if isinstance(problem, str) else []


def _test(record: Record, seconds: float) -> str | None:
    """``pytest -m gpu``; returns what failed."""
    tests = _ROOT / "tests" / "gpu"
    if not tests.is_dir():
        return "the tests are not here: make gpu runs from a checkout"
    command = [
        sys.executable, "-m", "pytest", "-m", "gpu", str(tests), "-v", "--durations=10",
        "-p", "no:cacheprovider",
    ]  # fmt: skip
    if importlib.util.find_spec("xdist") is not None:
        # Most of the time goes into compiling kernels.
        workers = min(max((os.cpu_count() or 1) - 2, 1), _MOST_WORKERS)
        command += ["-n", str(workers), "--dist", "worksteal"]
    # A session of its own, so that what the tests started can be stopped with them.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=_ROOT,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    stop = threading.Timer(seconds, _kill, [process])
    stop.daemon = True
    stop.start()
    counts: Counter[str] = Counter()
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            outcome = (
                re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line) if "::" in line else None
            )
            if outcome is not None and not line.startswith(
                ("FAILED", "ERROR")
            ):  # the summary again
                counts[outcome[0].lower()] += 1
    finally:
        stop.cancel()
        _kill(process)
    status = process.wait()
    record.add("tests", [{**counts, "status": status}])
    if status == 0:
        return None
    outcome_text = ", ".join(f"{count} {name}" for name, count in counts.items())
    stopped = f", stopped after {seconds:.0f} s" if status < 0 else ""
    return f"tests on the device: {outcome_text or 'none ran'}{stopped}"


def _kill(process: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError):  # all gone already
        os.killpg(process.pid, signal.SIGKILL)


def _plot(record: Record, path: Path) -> list[Path]:
    try:
        return layer.plot([layer.Row.from_json(row) for row in record.rows("sweep")], path)
    except (ImportError, ValueError, OSError) as error:
        print(f"no plot: {error}")
        return []


class _Tee:
    """Writes to two streams."""

    def __init__(self, *streams: IO[str]) -> None:
        self._streams = streams

    def write(self, text: str) -> int:
        for stream in self._streams:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        for stream in self._streams:
            stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._streams[0], name)


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Within the block, what is printed also goes to ``path``."""
    before = sys.stdout
    with path.open("w", encoding="utf-8") as log:
        sys.stdout = _Tee(before, log)
        try:
            yield
        finally:
            sys.stdout = before


if __name__ == "__main__":
    sys.exit(main())
