"""A bottleneck adapter's kernels on the device."""

import pytest
import torch
from bottlenecks import GRADIENTS, assert_right, drawn, results
from helpers import skip_unless_usable
from lorafast.kernels.bottleneck import bottleneck, bottleneck_backward

import lorafast
from lorafast import functional
from lorafast.core.problem import ACTIVATIONS

pytestmark = pytest.mark.gpu

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def _usable():
    skip_unless_usable("triton")


@pytest.mark.parametrize("adapter_dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    ("size", "residual"),
    [
        ((8192, 768, 768, 48), False),
        ((4096, 4096, 4096, 128), False),
        ((2049, 1537, 1031, 200), True),
        ((16, 4096, 4096, 64), False),
        ((1, 1, 1, 1), False),
    ],
    ids=str,
)
def test_against_the_reference(size, residual, adapter_dtype, device):
    given = drawn(*size, BF16, adapter_dtype, device, residual=residual)
    found = results(given, 0.7, "gelu", bottleneck, bottleneck_backward)
    assert_right(found, given, 0.7, "gelu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_activations_and_other_dtypes(dtype, activation, device):
    given = drawn(1000, 520, 520, 100, dtype, dtype, device)
    found = results(given, 0.7, activation, bottleneck, bottleneck_backward)
    assert_right(found, given, 0.7, activation)


def test_two_runs_give_the_same_bits(device):
    given = drawn(3000, 1024, 1024, 64, BF16, F32, device)
    first, second = (results(given, 1.0, "silu", bottleneck, bottleneck_backward) for _ in range(2))
    for name in ("y", "a", *GRADIENTS):
        assert torch.equal(first[name], second[name]), name


def test_a_graph_replays_a_training_step(device):
    given = drawn(512, 768, 768, 48, BF16, BF16, device)
    dy = given.pop("dy")
    leaves = [t.requires_grad_() for t in given.values() if t is not None]

    def step():
        with lorafast.use_backend("triton"):
            y = functional.bottleneck(**given, scaling=0.5)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    expected = step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.cuda.synchronize()
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)
