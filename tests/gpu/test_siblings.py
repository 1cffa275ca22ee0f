"""Layers that share x, on the device: right on every backend, on two streams, in a CUDA graph."""

import pytest
import torch
from helpers import assert_contract, skip_unless_usable
from sibling_layers import DTYPES, by_reference, drawn, shared, step
from torch import nn

import lorafast
from lorafast import ops, reference
from lorafast.nn import LoRALinear, siblings
from lorafast.ops import siblings as shared_op

pytestmark = pytest.mark.gpu
M, K, r = 1024, 512, 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["auto", "aten", "triton", "cuda"])
def test_contract(backend, dtype, device):
    if backend != "auto":
        skip_unless_usable(backend)
    x, layers = drawn(M=(3, 70), K=104, device=device)

    def call(operations, cast):
        plain = operations is reference
        with lorafast.use_backend("auto" if plain else backend):
            found = step(by_reference if plain else shared, x, layers, *DTYPES[dtype], cast=cast)
        return tuple(found[name] for name in sorted(found))

    try:
        assert_contract(call, ops, DTYPES[dtype][0], DTYPES[dtype][0])
    except lorafast.BackendError as error:
        if backend != "cuda":
            raise
        pytest.skip(str(error))


@pytest.fixture
def layers(device):
    made = [LoRALinear(K, N, r, device=device, dtype=torch.bfloat16) for N in (512, 128, 128)]
    for layer in made:
        nn.init.normal_(layer.lora_B, std=0.02)
    siblings.tie(made)
    return made


def outputs(layers, x):
    ys = [layer(x) for layer in layers]
    leaves = [x, *(t for layer in layers for t in (layer.lora_A, layer.lora_B))]
    return *ys, *torch.autograd.grad([y.float().square().sum() for y in ys], leaves)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_two_runs_give_the_same_bits(layers, device):
    x = torch.randn(M, K, device=device, dtype=torch.bfloat16, requires_grad=True)
    assert_same(outputs(layers, x), outputs(layers, x))


def test_another_stream_shares_nothing(layers, device, monkeypatch):
    made = []

    class Noted(shared_op.Shared):
        def __init__(self, x, by_key):
            super().__init__(x, by_key)
            made.append(self)

    monkeypatch.setattr(siblings, "Shared", Noted)
    x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
    expected = [layer(x) for layer in layers]
    assert len(made) == 1
    torch.cuda.synchronize()
    first = layers[0](x)
    with torch.cuda.stream(torch.cuda.Stream()):
        second = layers[1](x)
    torch.cuda.synchronize()
    assert len(made) == 3
    assert_same([first, second], expected[:2])


def test_in_a_cuda_graph(layers, device):
    x = torch.randn(M, K, device=device, dtype=torch.bfloat16, requires_grad=True)
    expected = outputs(layers, x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        outputs(layers, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs(layers, x)
    for t in captured:
        t.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, expected)
