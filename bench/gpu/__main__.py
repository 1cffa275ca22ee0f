"""Tests on the device, benchmarks, looks for faster launch configurations, records.

    make gpu                              # python -m lorafast.bench.gpu
    LORAFAST_OUT=/tmp/out make gpu

Leaves ``gpu-<name>-<date>.json``, a log and the plots in the folder that ``LORAFAST_OUT`` names
(default ``bench/results``). The record is written after every stage, so that nothing is lost. Exit
status: 0, 1 if a test failed or a contender was wrong, 2 without a GPU.
"""

import argparse
import datetime
import os
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

import torch
from lorafast.bench.call_overhead import run as run_call_overhead
from lorafast.bench.common import machine
from lorafast.bench.common.problem import Problem
from lorafast.bench.common.record import Record
from lorafast.bench.common.shapes import MODELS, Shape
from lorafast.bench.models import run as run_model
from lorafast.bench.operations import climb

from lorafast.bench import layer, operations, traffic

_SUMMARY = "Tests on the device, benchmarks, looks for faster launch configurations, records."
_ROOT = Path(__file__).resolve().parents[2]


@dataclass
class _Plan:
    """What the stages measure, and where."""

    device: torch.device
    table: list[Problem]
    square: Problem
    dropped: Problem
    against: tuple[str, ...]
    swept: list[Problem]
    model: str
    model_layers: int | None
    tokens: int


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
        against=("peft", "peft-compiled", "aten", "triton", "frozen"),
        swept=layer.sweep(table[0], "cuda"), model="llama-8b", model_layers=None, tokens=8192,
    )  # fmt: skip


def _plan_for_rehearsal() -> _Plan:
    """The same stages on the CPU, kernels interpreted, so small that a minute or two does."""
    table = [Problem(Shape("tiny", 40, 48, 56), 4, "bf16", "fp32", p) for p in (0.0, 0.05)]
    other = Problem(Shape("tiny", 20, 48, 56), 8, "bf16", "fp32", 0.0)
    return _Plan(
        torch.device("cpu"), table, square=table[0], dropped=table[1],
        against=("peft", "aten", "triton", "frozen"), swept=[table[0], other], model="qwen-0.6b",
        model_layers=1, tokens=8,
    )  # fmt: skip


@dataclass
class _Budget:
    """Seconds from the start at which each stage must end; what hasn't begun by then is named."""

    start: float
    total: float

    def until(self, share: float) -> float:
        """The moment of ``time.monotonic`` at which ``share`` of the time is used."""
        return self.start + share * self.total

    def left(self, share: float) -> float:
        """Seconds until then, at least ten."""
        return max(self.until(share) - time.monotonic(), 10.0)


def main(words: Sequence[str] | None = None) -> int:
    """Runs every stage."""
    parser = argparse.ArgumentParser(prog="make gpu", description=_SUMMARY)
    parser.add_argument("--minutes", type=float, default=8.5, help="for all of it (default: 8.5)")
    parser.add_argument("--skip-tests", action="store_true", help="only measure")
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU at tiny sizes: tries the command itself"
    )
    arguments = parser.parse_args(words)
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
    folder = Path(os.environ.get("LORAFAST_OUT") or _ROOT / "bench" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.json"
    budget = _Budget(time.monotonic(), 60 * arguments.minutes)
    record = Record(plan.device, ["make", "gpu", *(sys.argv[1:] if words is None else words)])
    with _log_to(folder / f"{stem}.log"):
        print(f"{machine.device_name(plan.device)}, {record.summary()}")
        stages = _stages(plan, budget, record, path)
        if arguments.skip_tests:
            del stages["tests on the device"]
        failed = _run(stages, budget, record, path)
        record.finish(complete=not failed)
        record.write(path)
        for drawn in _plot(record, path.with_suffix(".png")):
            print(f"drawn: {drawn}")
        print(f"recorded in {path} in {time.monotonic() - budget.start:.0f} s")
        if record.any_wrong():
            failed.append("a contender was WRONG, see above")
        for sentence in failed:
            print(f"FAILED: {sentence}")
    return 1 if failed else 0


def _stages(
    plan: _Plan, budget: _Budget, record: Record, path: Path
) -> dict[str, Callable[[], object]]:
    """Name → what to do; a stage that returns a sentence has failed."""
    device, both = plan.device, [plan.square, plan.dropped]
    return {
        "tests on the device": lambda: _test(record, budget.left(0.4), path),
        "operations": lambda: operations.run(
            both, ["aten", "triton"],
            device=device, seconds=0.3, record=record, deadline=budget.until(0.45),
        ),
        "layers": lambda: layer.run(
            plan.table, ["both"], plan.against,
            device=device, seconds=0.7, record=record, deadline=budget.until(0.7),
        ),
        "sweep": lambda: layer.run(
            plan.swept, ["both"], ["peft", "aten", "triton"],
            device=device, seconds=0.4, record=record, kind="sweep", deadline=budget.until(0.8),
        ),
        "call overhead": lambda: run_call_overhead(["peft"], device=device, record=record),
        "model": lambda: run_model(
            MODELS[plan.model], 16, "bf16", ["peft"],
            device=device, record=record, layers=plan.model_layers, tokens=plan.tokens, seconds=5.0,
        ),
        "traffic": lambda: traffic.run(both, ["peft", "aten", "triton"], record=record),
        "launch configurations": lambda: climb.run(
            plan.square, operations.CASES, device=device,
            seconds=budget.left(0.97) / len(operations.CASES), record=record,
        ),
    }  # fmt: skip


def _run(
    stages: dict[str, Callable[[], object]], budget: _Budget, record: Record, path: Path
) -> list[str]:
    """Every stage in turn; one that breaks is reported and does not stop the others."""
    failed = []
    for name, stage in stages.items():
        print(f"\n== {name} ({time.monotonic() - budget.start:.0f} s)", flush=True)
        try:
            problem = stage()
        except Exception:  # the other stages still tell something, and this one is reported
            traceback.print_exc(file=sys.stdout)
            problem = f"{name} broke"
        if isinstance(problem, str):
            failed.append(problem)
        record.write(path)
        torch.cuda.empty_cache()
    return failed


def _test(record: Record, seconds: float, path: Path) -> str | None:
    """``pytest -m gpu``; returns what failed."""
    tests = _ROOT / "tests" / "gpu"
    if not tests.is_dir():
        return "the tests are not here: make gpu runs from a checkout"
    report = path.with_suffix(".tests.xml")
    command = [
        sys.executable, "-m", "pytest", "-m", "gpu", str(tests), "-v", "--durations=10",
        "-p", "no:cacheprovider", f"--junitxml={report}",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=_ROOT
    )
    assert process.stdout is not None
    stop = threading.Timer(seconds, process.kill)
    stop.start()
    for line in process.stdout:
        print(line, end="", flush=True)
    stop.cancel()
    status = process.wait()
    counts = _counts(report)
    record.add("tests", [counts | {"status": status}])
    if status == 0:
        return None
    return f"tests on the device: {counts or f'stopped after {seconds:.0f} s'}"


def _counts(report: Path) -> dict[str, Any]:
    """Tests, failures, errors, skipped, from pytest's report, which is removed."""
    if not report.is_file():
        return {}
    suite = next(ElementTree.parse(report).iter("testsuite"))
    report.unlink()
    return {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}


def _plot(record: Record, path: Path) -> list[Path]:
    try:
        return layer.plot([layer.Row.from_json(row) for row in record.rows("sweep")], path)
    except (ImportError, ValueError) as error:
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
