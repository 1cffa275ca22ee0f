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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from lorafast.bench.common.problem import DTYPES, SCALING, Problem
from lorafast.bench.traffic import launches
from lorafast.bench.traffic.launches import H200_PROCESSORS, Launch
from lorafast.kernels.tables.find import WHOLE

from lorafast.ops import backend, dispatch
from lorafast.reference import wide

_WRONG, _UNCHECKED = 3, 4
_COUNTER = "int32"
_SMALL = (199, 297, 293)
"""M, K, N of a few blocks of the largest tiles, the last one cut off: no sum is split."""
_SPLIT = (599, 1097, 293)
"""M, K, N long enough to split every sum into partial ones."""
_RIDING = ((2190, 72, 520), (2190, 520, 264))
"""M, K, N of enough tiles for riders on ``_RIDING_PROCESSORS``, forward or backward, in rows that bulk
copies can read."""
_RIDING_PROCESSORS = 20


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
    """``problem`` at reduced sizes, none of which a block divides."""
    shape = problem.shape
    return [
        Reduced(
            min(shape.M, M), min(shape.K, K), min(shape.N, N), problem.r, problem.dtype,
            problem.adapter_dtype, shape.bias, bool(problem.dropout_p), processors,
        )
        for (M, K, N), processors in (
            (_SMALL, 1), (_SPLIT, H200_PROCESSORS), *((s, _RIDING_PROCESSORS) for s in _RIDING),
        )
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
        if loaded.dtype.name != _COUNTER:
            self._loads.append((pointers[mask.astype(bool)], loaded.dtype.itemsize))
        return loaded

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        if value.dtype.name != _COUNTER:
            self._stores.append((pointers[mask.astype(bool)], value.dtype.itemsize))
        return self._interpreter.store(pointers, value, mask)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._interpreter, name)


def _requested(accesses: Sequence[tuple[Any, int]]) -> int:
    return sum(int(pointers.size) * size for pointers, size in accesses)


_PAGE = 20
"""Bits of an address within a page of those below."""


def _distinct(accesses: Sequence[tuple[Any, int]]) -> int:
    """Bytes at distinct addresses; one buffer is always accessed in elements of one size."""
    import numpy

    touched: dict[tuple[int, int], Any] = {}
    for pointers, size in accesses:
        flat = pointers.reshape(-1)
        pages = flat >> _PAGE
        for page in range(int(pages.min()), int(pages.max()) + 1) if flat.size else ():
            if (size, page) not in touched:
                touched[size, page] = numpy.zeros((1 << _PAGE) // size, dtype=bool)
            within = flat[pages == page] & ((1 << _PAGE) - 1)
            touched[size, page][within // size] = True
    return sum(size * int(marked.sum()) for (size, _), marked in touched.items())


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
    M, K, N, r, dropout = problem.M, problem.K, problem.N, problem.r, problem.dropout
    dtype, adapter_dtype = DTYPES[problem.dtype], DTYPES[problem.adapter_dtype]
    x, dy = torch.ones((M, K), dtype=dtype), torch.ones((M, N), dtype=dtype)
    weight, bias = torch.ones((N, K), dtype=dtype), torch.ones(N, dtype=dtype)
    lora_A = torch.ones((r, K), dtype=adapter_dtype)
    lora_B = torch.ones((N, r), dtype=adapter_dtype)
    s = torch.ones((M, r), dtype=wide(dtype))
    masked: tuple[Any, ...] = (0.25, torch.tensor([1])) if dropout else (0.0, None)
    layer = launches.Layer(
        M, K, N, r, dtype, adapter_dtype.itemsize, problem.bias, dropout, problem.processors
    )
    run = SimpleNamespace(
        **{name: backend.TRITON.implementation(name) for name in (*dispatch.OPERATIONS, *WHOLE)}
    )
    biased = bias if problem.bias else None
    calls: dict[str, tuple[Callable[[], object], list[Launch]]] = {
        "shrink": (lambda: run.shrink(x, lora_A, *masked), launches.shrink(layer)),
        "linear_expand": (
            lambda: run.linear_expand(x, weight, s, lora_B, SCALING, biased),
            launches.linear_expand(layer, K, N, bias=layer.bias, dropout=False),
        ),
        "expand_backward": (
            lambda: run.expand_backward(dy, s, lora_B, SCALING),
            launches.expand_backward(layer),
        ),
        "shrink_backward": (
            lambda: run.shrink_backward(s, x, *masked, adapter_dtype),
            launches.shrink_backward(layer),
        ),
        "dx": (
            lambda: run.linear_expand(dy, weight.t(), s, lora_A.t(), 1.0, None, *masked),
            launches.linear_expand(layer, N, K, bias=False, dropout=dropout),
        ),
        "lora_linear": (
            lambda: run.lora_linear(x, weight, lora_A, lora_B, SCALING, biased, *masked),
            launches.lora_linear(layer),
        ),
        "lora_linear_backward": (
            lambda: run.lora_linear_backward(dy, x, weight, lora_A, lora_B, s, SCALING, *masked),
            launches.lora_linear_backward(layer),
        ),
    }
    differences: dict[str, str | None] = {}
    for name, (call, formula) in calls.items():
        with _counting(problem.processors) as counted:
            call()
        formula = [replace(launch, ridden=0) for launch in formula]  # not told apart there
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
    answered = process.returncode in (_WRONG, _UNCHECKED)
    said = (process.stdout if answered else process.stderr).strip().splitlines()
    last = said[-1] if said else f"the check ended with status {process.returncode}"
    return Verdict(wrong=last) if process.returncode == _WRONG else Verdict(unchecked=last)


def main() -> int:
    """Exit status 3 if a closed form is wrong, 4 if none can be checked; the last line says why."""
    reason = backend.TRITON.why_unusable()
    if reason is not None:
        print(reason)
        return _UNCHECKED
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
