"""Mixed batches over quantized weights, by the kernels that read their codes."""

import pytest
import torch
from helpers import DTYPES, covering, skip_unless_usable

import lorafast
from lorafast import operands, reference
from lorafast.backends import registry
from lorafast.core.problem import Problem
from lorafast.functional import grouped_lora_linear
from lorafast.operands import MXFP4
from lorafast.reference import contract

N, K, r, n = 40, 96, 3, 4
NAMES = ("x", "lora_A", "lora_B", "scaling", "bias")
FORMATS = ("nf4", "fp4", "int8", "fp8", "mxfp4", "w8a8")
READ = tuple(format for format in FORMATS if format != "w8a8")


def quantized(format, dtype):
    if format == "dense":
        return torch.randn(N, K, dtype=dtype)
    if format != "mxfp4":
        return operands.quantize(torch.randn(N, K, dtype=dtype), format)
    codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    return MXFP4(codes, torch.randint(120, 128, (N, K // 32), dtype=torch.uint8), dtype)


@pytest.mark.parametrize(
    ("format", "backend", "dtype", "rows"),
    covering(FORMATS, ("auto", "aten", "reference"), DTYPES, (0, 7, 300))
    + covering((*FORMATS, "dense"), ("cpu",), DTYPES, (0, 7, 300)),
    ids=str,
)
def test_output_and_gradients(format, backend, dtype, rows):
    """Nobody has adapter 2; some elements have none."""
    skip_unless_usable("cpu")
    weight = quantized(format, dtype)
    shapes = ((rows, K), (n, r, K), (n, N, r), (n,), (N,), (rows, N))
    *drawn, dy = (torch.randn(shape).to(dtype) for shape in shapes)
    adapter_of = [(0, 3, -1, 0, 1)[i % 5] for i in range(rows)]

    def run(layer, W, cast, **options):
        x, A, B, scaling, bias = leaves = [t.to(cast).requires_grad_() for t in drawn]
        y = layer(x, W, A, B, scaling, adapter_of, bias, **options)
        gradients = torch.autograd.grad(y, leaves, dy.to(cast))
        return dict(zip(("y", *NAMES), (y.detach(), *gradients), strict=True))

    with lorafast.use_backend(backend):
        found = run(grouped_lora_linear, weight, dtype)
    rounded = operands.activations(drawn[0], weight)
    eager, ref64 = (
        run(
            reference.grouped_lora_linear, operands.as_dense(weight).to(cast), cast,
            activations=None if rounded is drawn[0] else rounded.to(cast),
        )
        for cast in (dtype, torch.float64)
    )  # fmt: skip
    if rounded is not drawn[0]:  # dx is as if x were not rounded
        for one in (eager, ref64):
            del one["x"]
        del found["x"]
    reason = contract.why_any_broken(found, contract.bounds(eager, ref64))
    assert reason is None, reason


@pytest.mark.parametrize("format", READ)
@pytest.mark.parametrize("operation", ["grouped_lora_linear", "grouped_lora_linear_backward"])
def test_they_are_chosen(format, operation):
    skip_unless_usable("cpu")
    wants = ("y", "s") if operation == "grouped_lora_linear" else ("dx", "dA", "dB")
    problem = Problem(
        operation, 7, K, N, r, torch.bfloat16, torch.float32, torch.device("cpu"), format,
        wants=wants, format_parameters=quantized(format, torch.bfloat16).parameters, adapters=n,
    )  # fmt: skip
    made = registry.choose(problem)
    assert (made.backend, made.ahead) == ("cpu", f"it has kernels for {format}")


def test_a_dense_weight_is_multiplied_by_pytorch():
    problem = Problem(
        "grouped_lora_linear", 7, K, N, r, torch.bfloat16, torch.float32, torch.device("cpu"),
        wants=("y", "s"), adapters=n,
    )  # fmt: skip
    assert registry.choose(problem).backend == "aten"


@pytest.mark.parametrize("compiled", [False, True])
def test_a_forced_backward_that_reads_no_weight(compiled):
    """Neither x nor its dx is asked for."""
    skip_unless_usable("cpu")
    weight, x = quantized("nf4", torch.float32), torch.randn(5, K)
    A, B = torch.randn(n, r, K, requires_grad=True), torch.randn(n, N, r, requires_grad=True)

    def layer(x, A, B):
        return grouped_lora_linear(x, weight, A, B, 0.5, torch.tensor([0, 1, -1, 3, 3]))

    torch._dynamo.reset()
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    with lorafast.use_backend("cpu"):
        found = torch.autograd.grad(call(x, A, B).square().sum(), (A, B))
    dense = reference.grouped_lora_linear(
        x, weight.dense(), A, B, torch.full((n,), 0.5), [0, 1, -1, 3, 3], None
    )
    expected = torch.autograd.grad(dense.square().sum(), (A, B))
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
