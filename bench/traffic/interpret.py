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
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from lorafast.bench.common import bases
from lorafast.bench.common.problem import DTYPES, SCALING, Problem
from lorafast.bench.traffic import launches
from lorafast.bench.traffic.launches import H200_SMS, Launch
from lorafast.kernels.common.codes_plan import MOST_ROWS

from lorafast.backends import cost
from lorafast.backends.cost import Device
from lorafast.backends.plan import Plan
from lorafast.backends.triton import Triton, planning
from lorafast.backends.triton import cost as model
from lorafast.core.problem import DENSE, LAYER_OPERATIONS, WANTS, parts
from lorafast.core.problem import Problem as Call
from lorafast.operands import Operand
from lorafast.ops import problems
from lorafast.reference import wide

_WRONG, _UNCHECKED = 3, 4
_COUNTER = "int32"
_SMALL = (199, 297, 293)
"""M, K, N of a few blocks of the largest tiles, the last one cut off: no sum is split."""
_SPLIT = (599, 1097, 293)
"""M, K, N long enough to split every sum into partial ones."""
_HELPED = (2190, 72, 520)
"""M, K, N of enough tiles for helpers on ``_HELPED_SMS``, in rows that TMA can read."""
_HELPED_SMS = 20
_COLUMNS = 32


@dataclass(frozen=True)
class Reduced:
    """A problem small enough to interpret; with ``forward_only`` only what may have helpers is.

    Where ``base`` isn't dense only what reads codes is: the rest is as over a dense weight.
    """

    M: int
    K: int
    N: int
    r: int
    dtype: str
    adapter_dtype: str
    bias: bool
    dropout: bool
    sms: int
    forward_only: bool = False
    base: str = DENSE


def reduce(problem: Problem) -> list[Reduced]:
    """``problem`` at reduced sizes, none of which a block divides; a format's own blocks do, where it
    has to be so."""
    shape = problem.shape
    made = []
    if problem.base != DENSE:
        # Never fewer, so that every number of the tables is read.
        M, K, N = _SMALL
        whole = K - K % _COLUMNS
        K = whole if bases.why_not(problem.base, K) is not None else K
        made = [
            Reduced(
                min(shape.M, M), columns, N, problem.r, problem.dtype,
                problem.adapter_dtype, shape.bias, False, H200_SMS, base=problem.base,
            )
            # Products read codes whose rows are whole groups, and of few rows of x.
            for columns in dict.fromkeys((K, whole if shape.M <= MOST_ROWS else K))
        ]  # fmt: skip
    return made + [
        Reduced(
            min(shape.M, M), min(shape.K, K), min(shape.N, N), problem.r, problem.dtype,
            problem.adapter_dtype, shape.bias, bool(problem.dropout_p), sms, sms == _HELPED_SMS,
        )
        for (M, K, N), sms in (
            (_SMALL, 1), (_SPLIT, H200_SMS), (_HELPED, _HELPED_SMS),
        )
    ]  # fmt: skip


@dataclass
class _Accesses:
    """The addresses that a launch's programs load and store, with the bytes at each."""

    loads: list[tuple[Any, int]] = field(default_factory=list)
    stores: list[tuple[Any, int]] = field(default_factory=list)

    def sums(self) -> Launch:
        return Launch(
            _distinct(self.loads), _distinct(self.stores),
            _requested(self.loads), _requested(self.stores),
        )  # fmt: skip


def _note(accesses: list[tuple[Any, int]], pointers: Any, mask: Any, values: Any) -> None:
    dtype = values.data.dtype
    if dtype.name != _COUNTER:
        accesses.append((pointers.data[mask.data.astype(bool)], dtype.itemsize))


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
def _counting() -> Iterator[list[_Accesses]]:
    """What each launch of the block accesses: through three methods of the interpreter's builder."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    launched: list[_Accesses] = []
    begin, load, store = (
        Builder.set_grid_dim,
        Builder.create_masked_load,
        Builder.create_masked_store,
    )

    def counted_begin(builder: Any, *grid: int) -> None:
        launched.append(_Accesses())
        begin(builder, *grid)

    def counted_load(builder: Any, pointers: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        loaded = load(builder, pointers, mask, *rest, **more)
        _note(launched[-1].loads, pointers, mask, loaded)
        return loaded

    def counted_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _note(launched[-1].stores, pointers, mask, value)
        return store(builder, pointers, value, mask, *rest)

    with mock.patch.multiple(
        Builder,
        set_grid_dim=counted_begin,
        create_masked_load=counted_load,
        create_masked_store=counted_store,
    ):
        yield launched


def calls_of(reduced: Reduced) -> dict[str, tuple[Call, tuple[Any, ...]]]:
    """Every operation that a layer may ask for: the call, described, and what it is run on."""
    M, K, N, r, dropout = reduced.M, reduced.K, reduced.N, reduced.r, reduced.dropout
    dtype, adapter = DTYPES[reduced.dtype], DTYPES[reduced.adapter_dtype]
    x, dy = torch.ones((M, K), dtype=dtype), torch.ones((M, N), dtype=dtype)
    weight, ones = torch.ones((N, K), dtype=dtype), torch.ones(N, dtype=dtype)
    lora_A, lora_B = torch.ones((r, K), dtype=adapter), torch.ones((N, r), dtype=adapter)
    s = torch.ones((M, r), dtype=wide(dtype))
    p, seed = (0.25, torch.tensor([1])) if dropout else (0.0, None)
    bias = ones if reduced.bias else None
    layer = problems.layer_problem(
        x, weight, lora_A, lora_B, bias, dropout, ("y", "s"), layouts=True
    )

    def of_dy(*wants: str) -> tuple[Call, tuple[Any, ...]]:
        described = problems.expand_backward_problem(dy, s, lora_B, wants, adapter)
        return described, (dy, s, lora_B, SCALING)

    of_bias = {
        "dB and dbias": of_dy("dB", "dbias"),
        "ds, dB and dbias": of_dy("ds", "dB", "dbias"),
    }
    return {
        "shrink": (problems.shrink_problem(x, lora_A, p, seed), (x, lora_A, p, seed)),
        "expand": (
            problems.expand_problem(s, lora_B, p, seed, dtype), (s, lora_B, SCALING, p, seed),
        ),
        "linear_expand": (
            problems.linear_expand_problem(x, weight, s, lora_B, bias, 0.0, None, False),
            (x, weight, s, lora_B, SCALING, bias, 0.0, None),
        ),
        "expand_backward": of_dy("ds", "dB"),
        "ds": of_dy("ds"),
        "shrink_backward": (
            problems.shrink_backward_problem(s, x, p, seed, adapter), (s, x, p, seed),
        ),
        "dx": (
            problems.linear_expand_problem(dy, weight, s, lora_A.t(), None, p, seed, True),
            (dy, weight, s, lora_A.t(), 1.0, None, p, seed),
        ),
        "weight_norm": (
            problems.weight_norm_problem(weight, lora_A, lora_B, SCALING),
            (weight, lora_A, lora_B, SCALING),
        ),
        "lora_linear": (layer, (x, weight, lora_A, lora_B, SCALING, bias, p, seed)),
        "lora_linear_backward": (
            problems.backward_problem(layer, problems.FROZEN, dy, layouts=True),
            (dy, x, weight, lora_A, lora_B, s, SCALING, p, seed),
        ),
        **(of_bias if reduced.bias else {}),
    }  # fmt: skip


def compare_dequantize(weight: Operand) -> str | None:
    """None if the closed form says what was counted, else both; the weight gets other codes, so that
    each of them occurs, and each of a nested scale's."""
    for tensor in weight.tensors().values():
        if tensor.dtype is torch.uint8:
            every = torch.arange(tensor.numel(), dtype=torch.int32) % 256
            tensor.copy_(every.to(torch.uint8).view(tensor.shape))
    W = torch.empty(weight.shape, dtype=weight.dtype)
    with _counting() as launched:
        Triton().dequantize(weight, W)
    counted, formula = [a.sums() for a in launched], [launches.dequantization(weight, W)]
    return None if counted == formula else f"{counted}, by formula {formula}"


def compare_products(reduced: Reduced, weight: Operand) -> dict[str, str | None]:
    """The same of the products that read codes, y and dx, where one can."""
    M, K, N, r = reduced.M, reduced.K, reduced.N, reduced.r
    dtype, adapter = DTYPES[reduced.dtype], DTYPES[reduced.adapter_dtype]
    s = torch.ones((M, r), dtype=wide(dtype))
    bias = torch.ones(N, dtype=dtype) if reduced.bias else None
    device = cost.gpu_of(weight.device)
    assert device is not None
    from lorafast.backends.triton import launching  # which imports Triton

    differences: dict[str, str | None] = {}
    for name, (read, written), added in (
        ("linear_expand over codes", (K, N), bias),
        ("dx over codes", (N, K), None),
    ):
        x = torch.ones((M, read), dtype=dtype)
        factor = torch.ones((written, r), dtype=adapter)
        call = problems.linear_expand_problem(
            x, weight, s, factor, added, 0.0, None, name == "dx over codes"
        )
        launch = planning.plan_codes(call, device)
        if isinstance(launch, str):
            continue
        with _counting() as launched:
            launching.run_of(launch, call)(x, weight, s, factor, SCALING, added)
        counted = [accesses.sums() for accesses in launched]
        product = launches.codes_product(launch, call, weight)
        looked_up = launches.looked_up(launch, weight)
        formula = [replace(product, loaded=product.loaded + looked_up)]
        differences[name] = None if counted == formula else f"{counted}, by formula {formula}"
    x, A, B = (
        torch.ones(size, dtype=d)
        for size, d in (((M, K), dtype), ((r, K), adapter), ((N, r), adapter))
    )
    layer = problems.layer_problem(x, weight, A, B, bias, False, ("y", "s"), layouts=True)
    decode = planning.plan_decode(layer, device)
    if not isinstance(decode, str):
        with _counting() as launched:
            launching.run_of(decode, layer)(x, weight, A, B, SCALING, bias, 0.0, None)
        counted = [accesses.sums() for accesses in launched]
        whole = launches.codes_decoding(decode, layer, weight)
        looked_up = launches.looked_up(decode, weight)
        formula = [replace(whole, loaded=whole.loaded + looked_up)]
        same = counted == formula
        differences["lora_linear over codes"] = None if same else f"{counted}, by formula {formula}"
    return differences


def compare_bottleneck(reduced: Reduced, residual: bool) -> dict[str, str | None]:
    """The same of a bottleneck adapter that is r wide, forward and backward. ``residual``: it is added
    to another tensor than h, as it must be where K isn't N."""
    M, K, N, r = reduced.M, reduced.K, reduced.N, reduced.r
    dtype, adapter = DTYPES[reduced.dtype], DTYPES[reduced.adapter_dtype]
    h, dy = torch.ones((M, K), dtype=dtype), torch.ones((M, N), dtype=dtype)
    down, up = torch.ones((r, K), dtype=adapter), torch.ones((N, r), dtype=adapter)
    d, u = (torch.ones(size, dtype=adapter) if reduced.bias else None for size in (r, N))
    a, onto = torch.ones((M, r), dtype=wide(dtype)), dy if residual else None
    calls: dict[str, tuple[Call, tuple[Any, ...]]] = {
        "bottleneck": (
            problems.bottleneck_problem(h, down, up, d, u, "gelu", onto, ("y", "a")),
            (h, down, up, d, u, SCALING, onto),
        )
    }
    for name, wants in {"bottleneck_backward": WANTS["bottleneck_backward"], "dU": ("dU",)}.items():
        given = (dy, h, a, down, up)
        problem = problems.bottleneck_backward_problem(*given, "gelu", residual, wants, adapter)
        calls[name] = problem, (*given, SCALING)
    with cost.pretending(launches.h200(reduced.sms)):
        return {name: _difference(*call) for name, call in calls.items()}


def compare_scaled_linear(reduced: Reduced, scales_input: bool) -> dict[str, str | None]:
    """The same of a layer with a vector, forward and backward, all results and each alone."""
    M, K, N = reduced.M, reduced.K, reduced.N
    dtype, adapter = DTYPES[reduced.dtype], DTYPES[reduced.adapter_dtype]
    x, dy, weight = (torch.ones(size, dtype=dtype) for size in ((M, K), (M, N), (N, K)))
    scale = torch.ones(K if scales_input else N, dtype=adapter)
    bias = torch.ones(N, dtype=dtype) if reduced.bias else None
    kept = x if scales_input else dy.clone()
    calls: dict[str, tuple[Call, tuple[Any, ...]]] = {}
    for asked in [("y",)] if scales_input else [("y",), ("y", "z")]:
        problem = problems.scaled_linear_problem(x, weight, scale, bias, scales_input, asked)
        calls[", ".join(asked)] = problem, (x, weight, scale, bias)
    for asked in (("dx", "dscale"), ("dx",), ("dscale",)):
        given = (dy, kept, weight, scale)
        problem = problems.scaled_linear_backward_problem(*given, scales_input, asked)
        calls[", ".join(asked)] = problem, given
    with cost.pretending(launches.h200(reduced.sms)):
        return {name: _difference(*call) for name, call in calls.items()}


def formula_of(call: Call, device: Device) -> list[Launch]:
    """What the call moves, by the closed forms."""
    if call.operation not in LAYER_OPERATIONS:
        return launches.traffic_of(model.PLANNED[call.operation](call, device, None), call)
    together = model.in_one_launch(call, device)
    if not isinstance(together, str):
        return launches.traffic_of(together, call)
    return [launch for part in parts(call) for launch in formula_of(part, device)]


def compare(reduced: Reduced) -> dict[str, str | None]:
    """For each operation: None if the closed form says what was counted, else both."""
    if reduced.base != DENSE:
        W = torch.ones((reduced.N, reduced.K), dtype=DTYPES[reduced.dtype])
        weight = bases.quantized(W, reduced.base)
        assert weight is not None
        with cost.pretending(launches.h200(reduced.sms)):
            # In this order: the first gives the weight its codes.
            made_dense = compare_dequantize(weight)
            return {"dequantize": made_dense, **compare_products(reduced, weight)}
    differences: dict[str, str | None] = {}
    with cost.pretending(launches.h200(reduced.sms)):
        for name, (call, tensors) in calls_of(reduced).items():
            if reduced.forward_only and call.operation != "lora_linear":
                continue
            differences[name] = _difference(call, tensors)
    return differences


def _difference(call: Call, tensors: tuple[Any, ...]) -> str | None:
    """None if the closed form says what is counted where ``call`` runs on ``tensors``, else both."""
    plan = Triton().plan(call)
    assert isinstance(plan, Plan), plan
    with _counting() as launched:
        plan.run(*tensors)
    counted = [accesses.sums() for accesses in launched]
    device = cost.gpu_of(call.device)
    assert device is not None
    # What helpers read is not told apart there, and PyTorch's own is not interpreted.
    formula = [
        replace(launch, helped=0) for launch in formula_of(call, device) if not launch.by_pytorch
    ]
    return None if counted == formula else f"{counted}, by formula {formula}"


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
    reason = Triton().why_unusable()
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
