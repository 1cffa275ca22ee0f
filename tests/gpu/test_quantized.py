"""Layers over quantized weights on the device: right by every backend, W made dense to the bit."""

import gc

import pytest
import torch
from helpers import skip_unless_usable
from lorafast.bench.common.bases import BASES
from lorafast.bench.common.check import why_wrong
from lorafast.bench.common.contenders import BUILDERS
from lorafast.bench.common.problem import Problem, draw
from lorafast.bench.common.shapes import Shape
from lorafast.kernels.dequantize import dequantize as triton_dequantize
from quantized_weights import KINDS, same
from quantized_weights import draw as draw_weight
from torch import nn

import lorafast
from lorafast import functional, operands
from lorafast.backends import forced
from lorafast.backends.cuda import dequantize as cuda_dequantize
from lorafast.nn import LoRALinear
from lorafast.reference import contract

pytestmark = pytest.mark.gpu

BACKENDS = ["aten", "triton", "cuda"]
ROWS = [1, 5, 16, 33, 100, 256, 1000]
"""On both sides of every border between products that read codes and W made dense."""
FORMATS = [base for base in BASES if base != operands.DENSE]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEQUANTIZE = {"triton": triton_dequantize, "cuda": cuda_dequantize.dequantize}


@pytest.fixture(autouse=True)
def _free_memory():
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", FORMATS)
@pytest.mark.parametrize("M", ROWS)
def test_layer(base, M, backend, device):
    skip_unless_usable(backend)
    for dropout_p in (0.0, 0.05):
        problem = Problem(Shape("", M, 1024, 1536, bias=True), 16, "bf16", "fp32", dropout_p, base)
        tensors = draw(problem, device, 1)
        assert why_wrong(BUILDERS[backend](problem, tensors), problem, tensors) is None, problem


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("base", FORMATS)
def test_layer_in_other_dtypes(base, dtype, backend, device):
    skip_unless_usable(backend)
    for M, K, N in ((3, 544, 777), (70, 544, 777), (600, 1024, 512)):
        problem = Problem(Shape("", M, K, N), 17, dtype, dtype, 0.0, base)
        tensors = draw(problem, device, 1)
        assert why_wrong(BUILDERS[backend](problem, tensors), problem, tensors) is None, problem


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_real_layer(backend, device):
    skip_unless_usable(backend)
    for base in ("nf4", "int8", "fp8"):
        problem = Problem(Shape("", 2048, 4096, 14336), 16, "bf16", "fp32", 0.0, base)
        tensors = draw(problem, device, 1)
        assert why_wrong(BUILDERS[backend](problem, tensors), problem, tensors) is None, problem


@pytest.mark.parametrize("backend", DEQUANTIZE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_w_made_dense_has_the_bits_of_a_cpu(kind, dtype, backend, device):
    skip_unless_usable(backend)
    for N, K in ((3, 32), (96, 131), (777, 1536), (2048, 4096)):
        weight = draw_weight(kind, N, K if kind != "mxfp4" else K // 32 * 32, torch.bfloat16, "cpu")
        there = (
            type(weight)
            .build({name: t.to(device) for name, t in weight.tensors().items()}, weight.parameters)
            .to(dtype)
        )
        W = torch.full(weight.shape, float("nan"), dtype=dtype, device=device)
        DEQUANTIZE[backend](there, W)
        same(W.cpu(), weight.to(dtype).dense())
        same(there.dense().cpu(), weight.to(dtype).dense())


@pytest.mark.parametrize("base", ["nf4", "int8", "fp8"])
def test_quantizing_gives_the_codes_of_a_cpu(base, device):
    """Scales in float32: the mean of nested ones is summed in another order there."""
    weight, options = torch.randn(512, 1024), {"nested": False} if base == "nf4" else {}
    here, there = (operands.quantize(w, base, **options) for w in (weight, weight.to(device)))
    for name, tensor in here.tensors().items():
        found = there.tensors()[name].cpu()
        assert found.dtype is tensor.dtype, name
        assert torch.equal(found.float(), tensor.float()), name


@pytest.mark.parametrize("size", [(512, 1024), (768, 520)])
@pytest.mark.parametrize("M", [1, 16, 100])
def test_products_in_fp8(size, M, device):
    N, K, r = *size, 8
    tensors = (M, K), (r, K), (N, r), (N,)
    x, A, B, bias = (torch.randn(s, device=device).bfloat16() for s in tensors)
    weight = operands.W8A8.of(torch.randn(N, K, device=device).bfloat16())

    def reference(dtype):
        scale = x.float().abs().amax(1, keepdim=True) / 448
        rounded = (x.float() / scale).to(torch.float8_e4m3fn).to(dtype) * scale.to(dtype)
        s = lorafast.reference.shrink(x.to(dtype), A.to(dtype))
        return lorafast.reference.linear_expand(
            rounded, weight.dense().to(dtype), s, B.to(dtype), 0.5, bias.to(dtype)
        )

    y = functional.lora_linear(x, weight, A, B, 0.5, bias)
    eager, exact = reference(torch.bfloat16), reference(torch.float64)
    assert contract.why_broken(y, eager, exact) is None


def adapted(base, device, K=1024, N=768):
    linear = nn.Linear(K, N, device=device, dtype=torch.bfloat16)
    weight = operands.quantize(linear.weight.detach(), base)
    layer = LoRALinear.from_operand(weight, 16, alpha=32, bias=linear.bias.detach())
    nn.init.normal_(layer.lora_B)
    return layer


def step(layer, x, dy):
    x = x.detach().requires_grad_()
    layer.lora_A.grad = layer.lora_B.grad = None
    y = layer(x)
    y.backward(dy)
    return [y.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("M", [8, 100, 512])
def test_layers_on_two_streams_at_once_share_no_workspace(M, backend, device):
    skip_unless_usable(backend)
    layers = [adapted("nf4", device) for _ in range(4)]
    x, dy = (torch.randn(M, n, device=device).bfloat16() for n in (1024, 768))
    with forced.use_backend(backend):
        expected = [step(layer, x, dy) for layer in layers]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in layers]
        for _ in range(20):
            found = []
            for layer, stream in zip(layers, streams, strict=True):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    found.append(step(layer, x, dy))
            torch.cuda.synchronize()
            for one, other in zip(found, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("M", [8, 100, 512])
def test_a_captured_step_replays(M, backend, device):
    skip_unless_usable(backend)
    layer = adapted("nf4", device)
    x, dy = (torch.randn(M, n, device=device).bfloat16() for n in (1024, 768))
    x.requires_grad_()
    inputs = (x, layer.lora_A, layer.lora_B)

    def run():
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]

    with forced.use_backend(backend):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run()
        for _ in range(3):
            with torch.no_grad():
                x.normal_()
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(found, run(), strict=True))


@pytest.mark.parametrize("backend", ["triton", "cuda"])  # aten's is PyTorch's own memory
def test_no_second_weight_stays_in_memory(backend, device):
    """One workspace, of W's size, for all layers; nothing of that size is saved for backward."""
    skip_unless_usable(backend)
    layers = nn.Sequential(*(adapted("nf4", device, 2048, 2048) for _ in range(6)))
    x = torch.randn(512, 2048, device=device).bfloat16().requires_grad_()
    one = 2048 * 2048 * 2
    with forced.use_backend(backend):
        layers(x).sum().backward()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = layers(x)
        saved = torch.cuda.memory_allocated() - before
        y.sum().backward()
        peak = torch.cuda.max_memory_allocated() - before
    activations = 6 * 512 * 2048 * 2
    assert saved < activations + one / 2, saved
    assert peak < 2 * activations + 1.5 * one, peak


def test_nothing_waits_for_the_device(device):
    layer = adapted("nf4", device)
    batches = [
        [torch.randn(M, n, device=device).bfloat16() for n in (1024, 768)] for M in (8, 100, 512)
    ]
    for batch in batches:
        step(layer, *batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            step(layer, *batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
