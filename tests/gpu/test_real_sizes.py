"""Every backend against the float64 reference at the sizes of real models."""

import gc

import pytest
import torch
from helpers import assert_contract, skip_unless_usable
from lorafast.bench.common.check import why_wrong
from lorafast.bench.common.contenders import BUILDERS
from lorafast.bench.common.problem import Problem, draw
from lorafast.bench.common.shapes import Shape

from lorafast import ops
from lorafast.backends import forced
from lorafast.reference import wide

pytestmark = pytest.mark.gpu

BACKENDS = ["aten", "triton", "cuda"]
SHAPES = [
    Shape("llama-8b q,o", 8192, 4096, 4096),
    Shape("llama-8b k,v", 8192, 4096, 1024),
    Shape("llama-8b down", 2048, 14336, 4096),
    Shape("few rows", 33, 4096, 4096, bias=True),
    Shape("nothing divides", 1023, 1537, 2049, bias=True),
]


@pytest.fixture(autouse=True)
def _free_memory(backend):
    skip_unless_usable(backend)
    yield
    gc.collect()
    torch.cuda.empty_cache()


def problems():
    for shape in SHAPES:
        for dtype in ("bf16", "fp16", "fp32"):
            if dtype != "bf16" and shape is not SHAPES[0] and shape is not SHAPES[-1]:
                continue
            for r in (16, 64) if shape is SHAPES[0] and dtype == "bf16" else (16,):
                for dropout_p in (0.0, 0.05):
                    yield Problem(shape, r, dtype, "fp32", dropout_p)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", problems(), ids=str)
def test_layer(problem, backend, device):
    tensors = draw(problem, device, 1)
    assert why_wrong(BUILDERS[backend](problem, tensors), problem, tensors) is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("r", [1, 5, 16, 100, 300])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_ranks(r, dropout_p, backend, device):
    problem = Problem(Shape("", 515, 520, 260, bias=True), r, "bf16", "bf16", dropout_p)
    tensors = draw(problem, device, 1)
    assert why_wrong(BUILDERS[backend](problem, tensors), problem, tensors) is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_strided_operations(dtype, backend, device):
    M, K, N, r = 257, 200, 136, 17
    x, dy = (torch.randn(size, M, device=device).t() for size in (K, N))
    weight, lora_A = torch.randn(N, 2 * K, device=device)[:, ::2], torch.randn(K, r, device=device)
    lora_B = torch.randn(r, N, device=device)
    s, low = torch.randn(M, r, device=device), wide(dtype)
    calls = (
        lambda run, cast: run.shrink(cast(x), cast(lora_A).t()),
        lambda run, cast: run.linear_expand(
            cast(x), cast(weight), cast(s, low), cast(lora_B).t(), 0.7
        ),
        lambda run, cast: run.expand_backward(cast(dy), cast(s, low), cast(lora_B).t(), 0.7),
        lambda run, cast: run.shrink_backward(cast(s, low), cast(x)),
    )
    with forced.use_backend(backend):
        for call in calls:
            assert_contract(call, ops, dtype)
