"""What our Triton kernels really load and store: run in the interpreter, every access counted.

    python -m lorafast.bench.traffic.interpret <problems.jsonl

reads ``Reduced`` problems, a line each, and prints for each operation whether the closed form of
``launches`` says exactly what was counted. It is a process of its own because
Triton decides at import whether it interprets.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from lorafast.bench.common.problem import DTYPES, SCALING, Problem
from lorafast.bench.traffic import launches
from lorafast.bench.traffic.launches import H200_PROCESSORS, Launch

from lorafast.ops import backend

_WRONG = 3
_SMALL = (199, 297, 293)
"""M, K, N of a few blocks of the largest tiles, the last one cut off: no sum is split."""
_SPLIT = (599, 1097, 293)
"""M, K, N long enough to split every sum into partial ones."""


@dataclass(frozen=True)
class Reduced:
    """A problem small enough to interpret."""

    M: int
    K: int
    N: int
    r: int
    dtype: str
    adapter_dtype: str
    bias: bool
    dropout: bool
    processors: int


def reduce(problem: Problem) -> list[Reduced]:
    """``problem`` at two reduced sizes, none of which a block divides."""
    shape = problem.shape
    return [
        Reduced(
            min(shape.M, M), min(shape.K, K), min(shape.N, N), problem.r, problem.dtype,
            problem.adapter_dtype, shape.bias, bool(problem.dropout_p), processors,
        )
        for (M, K, N), processors in ((_SMALL, 1), (_SPLIT, H200_PROCESSORS))
    ]  # fmt: skip


class _Counted:
    """Stands before the interpreter's memory access and keeps every address."""

    def __init__(self, interpreter: Any) -> None:
        self._interpreter = interpreter
        self.launches: list[Launch] = []

    def begin(self) -> None:
        self._loads: list[tuple[Any, int]] = []
        self._stores: list[tuple[Any, int]] = []

    def end(self) -> None:
        self.launches.append(
            Launch(
                _distinct(self._loads), _distinct(self._stores),
                _requested(self._loads), _requested(self._stores),
            )
        )  # fmt: skip

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        loaded = self._interpreter.load(pointers, mask, other, dtype)
        self._loads.append((pointers[mask.astype(bool)], loaded.dtype.itemsize))
        return loaded

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        self._stores.append((pointers[mask.astype(bool)], value.dtype.itemsize))
        return self._interpreter.store(pointers, value, mask)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._interpreter, name)


def _requested(accesses: Sequence[tuple[Any, int]]) -> int:
    return sum(int(pointers.size) * size for pointers, size in accesses)


def _distinct(accesses: Sequence[tuple[Any, int]]) -> int:
    """Bytes at distinct addresses; one buffer is always accessed in elements of one size."""
    import numpy

    total = 0
    for size in {size for _, size in accesses}:
        pointers = [p.reshape(-1) for p, s in accesses if s == size]
        total += int(numpy.unique(numpy.concatenate(pointers)).size) * size
    return total


@contextmanager
def _counting(processors: int) -> Iterator[list[Launch]]:
    """The launches of the block, cut as for a device of so many multiprocessors."""
    from lorafast.kernels.common import launch
    from triton.runtime import interpreter

    counted = _Counted(interpreter._interpreter)
    run = interpreter.GridExecutor.__call__

    def counted_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        counted.begin()
        result = run(self, *args, **kwargs)
        counted.end()
        return result

    with (
        mock.patch.object(launch, "INTERPRETER_PROCESSORS", processors),
        mock.patch.object(interpreter, "_interpreter", counted),
        mock.patch.object(interpreter.GridExecutor, "__call__", counted_run),
    ):
        yield counted.launches


def compare(problem: Reduced) -> dict[str, str | None]:
    """For each operation: None if the closed form says what was counted, else both."""
    from lorafast.kernels.expand_backward import expand_backward
    from lorafast.kernels.linear_expand import linear_expand
    from lorafast.kernels.shrink import shrink
    from lorafast.kernels.shrink_backward import shrink_backward

    M, K, N, r, dropout = problem.M, problem.K, problem.N, problem.r, problem.dropout
    processors = problem.processors
    dtype, adapter_dtype = DTYPES[problem.dtype], DTYPES[problem.adapter_dtype]
    size, adapter_size = dtype.itemsize, adapter_dtype.itemsize
    x, dy = torch.ones((M, K), dtype=dtype), torch.ones((M, N), dtype=dtype)
    weight, bias = torch.ones((N, K), dtype=dtype), torch.ones(N, dtype=dtype)
    lora_A, lora_B = (
        torch.ones((r, K), dtype=adapter_dtype),
        torch.ones((N, r), dtype=adapter_dtype),
    )
    s = torch.ones((M, r), dtype=dtype)
    masked: tuple[Any, ...] = (0.25, torch.tensor([1])) if dropout else (0.0, None)
    calls = {
        "shrink": (
            lambda: shrink(x, lora_A, *masked),
            launches.shrink(M, K, r, size, adapter_size, dropout, processors),
        ),
        "linear_expand": (
            lambda: linear_expand(x, weight, s, lora_B, SCALING, bias if problem.bias else None),
            launches.linear_expand(M, K, N, r, size, adapter_size, problem.bias, False),
        ),
        "expand_backward": (
            lambda: expand_backward(dy, s, lora_B, SCALING),
            launches.expand_backward(M, N, r, size, adapter_size, processors),
        ),
        "shrink_backward": (
            lambda: shrink_backward(s, x, *masked, dtype=adapter_dtype),
            launches.shrink_backward(M, K, r, size, adapter_size, dropout, processors),
        ),
        "dx": (
            lambda: linear_expand(dy, weight.t(), s, lora_A.t(), 1.0, None, *masked),
            launches.linear_expand(M, N, K, r, size, adapter_size, False, dropout),
        ),
    }
    differences: dict[str, str | None] = {}
    for name, (call, formula) in calls.items():
        with _counting(processors) as counted:
            call()
        differences[name] = None if counted == formula else f"{counted}, by formula {formula}"
    return differences


@dataclass(frozen=True)
class Verdict:
    """On the closed forms: what is ``wrong`` with them, or why they are ``unchecked`` here."""

    wrong: str | None = None
    unchecked: str | None = None


def check(problems: Sequence[Problem]) -> Verdict:
    """Holds the closed forms against the interpreter, in a process of its own."""
    lines = "\n".join(
        json.dumps(asdict(p)) for p in dict.fromkeys(r for p in problems for r in reduce(p))
    )
    process = subprocess.run(
        [sys.executable, "-m", __name__],
        input=lines,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        check=False,
    )
    if process.returncode == 0:
        return Verdict()
    said = (process.stdout + process.stderr).strip().splitlines()
    last = said[-1] if said else f"the check ended with status {process.returncode}"
    return Verdict(wrong=last) if process.returncode == _WRONG else Verdict(unchecked=last)


def main() -> int:
    """Exit status 3 if a closed form is wrong, 1 if none can be checked; the last line says why."""
    reason = backend.TRITON.why_unusable()
    if reason is not None:
        print(reason)
        return 1
    for line in sys.stdin:
        problem = Reduced(**json.loads(line))
        for name, difference in compare(problem).items():
            if difference is not None:
                print(f"{name} on {problem}: counted {difference}")
                return _WRONG
            print(f"{name} on {problem}: as counted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
