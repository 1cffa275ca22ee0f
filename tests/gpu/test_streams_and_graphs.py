"""Launches go to the current stream, and a captured graph replays what was captured."""

import pytest
import torch
from helpers import skip_unless_usable
from torch import nn

from lorafast.backends import forced
from lorafast.nn import LoRALinear

pytestmark = pytest.mark.gpu

M, K, N, r = 512, 1024, 768, 16
BACKENDS = ["aten", "triton", "cuda"]


@pytest.fixture
def layer(device, backend):
    skip_unless_usable(backend)
    linear = nn.Linear(K, N, device=device, dtype=torch.bfloat16)
    layer = LoRALinear.from_linear(linear, r, alpha=2 * r)
    nn.init.normal_(layer.lora_B)
    return layer


def draw(*size, device):
    return torch.randn(size, device=device, dtype=torch.bfloat16)


def step(layer, x, dy):
    """Output and every gradient of one forward and backward."""
    x = x.detach().requires_grad_()
    layer.lora_A.grad = layer.lora_B.grad = None
    y = layer(x)
    y.backward(dy)
    return {
        "y": y.detach(),
        "dx": x.grad,
        "dA": layer.lora_A.grad,
        "dB": layer.lora_B.grad,
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_launches_go_to_the_current_stream(layer, backend, device):
    x = draw(M, K, device=device)
    with torch.no_grad(), forced.use_backend(backend):
        expected = layer(x)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            layer(x)  # its workspace and its memory, which an allocation might wait for
        torch.cuda.synchronize()
        # The default stream is busy for about a second: what was launched on it waits that long.
        torch.cuda._sleep(2_000_000_000)
        busy = torch.cuda.Event()
        busy.record()
        with torch.cuda.stream(side):
            found = layer(x)
            done = torch.cuda.Event()
            done.record()
        done.synchronize()
        assert not busy.query()
    torch.cuda.synchronize()
    assert torch.equal(expected, found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_on_a_second_stream(layer, backend, device):
    x, dy = draw(M, K, device=device), draw(M, N, device=device)
    with forced.use_backend(backend):
        expected = step(layer, x, dy)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            found = step(layer, x, dy)
    torch.cuda.synchronize()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_captured_step_replays(layer, backend, device):
    x, dy = draw(M, K, device=device), draw(M, N, device=device)
    with forced.use_backend(backend):
        replay, found = capture(layer, x, dy)
        for _ in range(3):
            x.copy_(draw(M, K, device=device))
            dy.copy_(draw(M, N, device=device))
            replay()
            replayed = {name: value.clone() for name, value in found.items()}
            for name, value in step(layer, x, dy).items():
                assert torch.equal(value, replayed[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_captured_dropout_draws_a_new_mask_on_every_replay(layer, backend, device):
    layer.dropout = 0.5
    x, dy = draw(M, K, device=device), draw(M, N, device=device)
    with forced.use_backend(backend):
        replay, found = capture(layer, x, dy)
        outputs = []
        for _ in range(3):
            replay()
            outputs.append(found["y"].clone())
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    assert all(torch.isfinite(y).all() for y in outputs)


def capture(layer, x, dy):
    """A captured step: the function that replays it, and its outputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles the kernels, fills the caches
            step(layer, x, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(layer, x, dy)
    return graph.replay, found
