"""``pytest bench/``: the operations and the layer under pytest-benchmark, with its compare and JSON.

Host time of a call, the device synchronised. ``lorafast bench`` takes contenders in turn, checks more
and is what figures are quoted from; this is for working on one operation.
"""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from lorafast.bench.common.check import why_wrong as why_layer_wrong
from lorafast.bench.common.contenders import BUILDERS, UnavailableError
from lorafast.bench.common.problem import DTYPES, Problem, draw, input_sets
from lorafast.bench.common.shapes import Shape
from lorafast.bench.operations.cases import cases
from lorafast.bench.operations.job import as_is, why_unavailable, why_wrong

from lorafast.ops.problems import on_backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROBLEMS = {
    "cpu": [
        Problem(Shape("minilm q,k,v,o", 512, 384, 384), 16, "fp32", "fp32", 0.0),
        Problem(Shape("minilm q,k,v,o", 512, 384, 384), 16, "fp32", "fp32", 0.05),
        Problem(Shape("", 512, 2048, 2048), 16, "bf16", "fp32", 0.0),
    ],
    "cuda": [
        Problem(Shape("llama-8b q,o", 8192, 4096, 4096), 16, "bf16", "fp32", 0.0),
        Problem(Shape("llama-8b q,o", 8192, 4096, 4096), 16, "bf16", "fp32", 0.05),
        Problem(Shape("llama-8b k,v", 8192, 4096, 1024), 16, "bf16", "fp32", 0.0),
    ],
}[DEVICE.type]


def _short(problem):
    shape = problem.shape
    sizes = f"{shape.M}x{shape.K}x{shape.N}"
    return f"{sizes}-r{problem.r}-{problem.dtype}-p{problem.dropout_p:g}"


@pytest.fixture(params=PROBLEMS, ids=_short)
def problem(request):
    return request.param


@pytest.fixture
def tensors(problem):
    return draw(problem, DEVICE, input_sets(problem))


@pytest.fixture
def timed(benchmark, problem):
    """``timed(what, calls)``: the calls in turn, in a group of their own problem."""

    def run(what, calls):
        turn = itertools.cycle(calls)

        def call():
            next(turn)()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark.group = f"{what}  {problem}"
        benchmark(call)

    return run


@pytest.fixture
def time_operation(timed, problem, tensors):
    """``time_operation(case, backend)``, its result checked first."""

    def run(name, backend):
        by_set = [
            cases(problem, replace(tensors, x=[x], dy=[dy]))[name]
            for x, dy in zip(tensors.x, tensors.dy, strict=True)
        ]
        reason = why_unavailable(by_set[0], backend)
        if reason is not None:
            pytest.skip(reason)
        operations = on_backend(backend)
        reason = why_wrong(by_set[0], operations, DTYPES[problem.dtype])
        assert reason is None, f"WRONG: {reason}"
        timed(name, [functools.partial(case.call, operations, as_is) for case in by_set])

    return run


@pytest.fixture
def time_layer(timed, problem, tensors):
    """``time_layer(contender)``: forward and backward with dx, its results checked first."""

    def run(name):
        try:
            contender = BUILDERS[name](problem, tensors)
        except UnavailableError as error:
            pytest.skip(str(error))
        reason = why_layer_wrong(contender, problem, tensors)
        assert reason is None, f"WRONG: {reason}"

        def step(x, dy):
            contender.clear_gradients()
            contender.layer(x.detach().requires_grad_()).backward(dy)

        with contender.context():
            timed(
                "lora_linear",
                [
                    functools.partial(step, x, dy)
                    for x, dy in zip(tensors.x, tensors.dy, strict=True)
                ],
            )

    return run
