"""What the backend plans for quantized weights, executed: W made dense by one launch, then the layer."""

import functools

import pytest
import torch
from cards import CUDA, Device, problem
from codes_cases import BF16, F16, F32, drawn
from on_machine import launched, needs_nvcc

from lorafast.backends import dequantized
from lorafast.backends.cuda import Cuda, native
from lorafast.backends.cuda import backend as module
from lorafast.backends.plan import Plan, Refusal
from lorafast.ops.problems import by_plans
from lorafast.reference import contract, wide

DEVICE = Device.known_by("NVIDIA A100-SXM4-80GB", 80, 4, 1.41e9, 1.593e9, 5120)
M, K, N, r = 21, 96, 40, 5


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setattr(module, "gpu_of", lambda device: DEVICE)
    monkeypatch.setattr(native, "why_not_here", lambda device: None)
    return Cuda()


def asked(operation, weight, m=M, **more):
    return problem(
        operation, m, K, N, r, weight.dtype, format=weight.format,
        format_parameters=weight.parameters, **more,
    )  # fmt: skip


@needs_nvcc
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", ["nf4", "int8", "fp8-blocks", "mxfp4"])
def test_y_and_dx(backend, name, dtype):
    weight = drawn(name, N, K, dtype)
    W = weight.dense()
    run = by_plans(functools.cache(lambda p: backend.plan(p._replace(device=CUDA))))
    x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    A, B, bias = torch.randn(r, K).to(dtype), torch.randn(N, r).to(dtype), torch.randn(N).to(dtype)
    s, ds = (torch.randn(M, r).to(wide(dtype)) for _ in range(2))

    def results(of, cast):
        own = weight if of is run else cast(W)
        if of is run:
            with launched(80) as ran:
                y = run.linear_expand(x, own, s, B, 0.7, bias)
                dx = run.linear_expand(dy, own, ds, A.t(), 1.0, None, 0.0, None, transposed=True)
            first = [launch.op for launch in ran.launches]
            assert [op for op in first if op.startswith("dequantize")] == [first[0]] * 2
            return y, dx
        low = wide(dtype)
        return (
            of.linear_expand(cast(x), own, cast(s, low), cast(B), 0.7, cast(bias)),
            of.linear_expand(cast(dy), own.t(), cast(ds, low), cast(A).t(), 1.0),
        )

    assert contract.compare(results, run, dtype).why_broken is None


class TestPlans:
    @pytest.mark.parametrize("name", ["nf4", "int8", "fp8-one", "mxfp4"])
    def test_the_dense_plan_behind_a_launch(self, backend, name):
        weight = drawn(name, N, K)
        for operation, more in (
            ("linear_expand", {}),
            ("linear_expand", {"transposed": True}),
            ("lora_linear", {"wants": ("y", "s")}),
            ("lora_linear_backward", {"wants": ("dx", "dA", "dB")}),
        ):
            p = asked(operation, weight, m=512, **more)
            plan, dense = backend.plan(p), backend.plan(dequantized.dense(p))
            assert plan.launches[0].startswith(f"dequantize {weight.format}: W 40 x 96")
            assert plan.launches[1:] == dense.launches
            assert plan.seconds > dense.seconds
            assert "to make W dense, then " in plan.source
            assert not plan.measured

    def test_a_backward_that_reads_no_weight_is_the_dense_one(self, backend):
        p = asked("lora_linear_backward", drawn("nf4", N, K), wants=("dA", "dB"))
        assert "dequantize" not in " ".join(backend.plan(p).launches)

    def test_another_format(self, backend):
        answer = backend.plan(problem("linear_expand", format="other"))
        assert isinstance(answer, Refusal)
        assert "the weight is stored as other, the kernels read dense ones and nf4" in answer.reason

    def test_a_dtype_that_the_kernels_have_not(self, backend):
        weight = drawn("nf4", N, K, torch.float64)
        assert isinstance(backend.plan(asked("linear_expand", weight)), Refusal)
        assert isinstance(backend.plan(asked("linear_expand", weight.to(BF16))), Plan)
