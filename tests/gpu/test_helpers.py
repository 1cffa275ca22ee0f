"""A forward whose programs wait for each other: it ends, and says the same every time."""

import pytest
import torch
from helped import with_helpers
from helpers import assert_contract
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.lora_linear import lora_linear
from torch import nn

pytestmark = pytest.mark.gpu

K, N, r = 2048, 2048, 16
# Descriptors only where the architecture has TMA; every architecture can have helpers.
POINTERS = LaunchConfig(64, 64, 32, 16, 4, 3, helpers=8)


@pytest.fixture
def helped(monkeypatch, device):
    """Helpers are launched, whatever the model says of them on this device."""
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    with_helpers(monkeypatch, helpers=min(16, programs // 2), waves=2, programs=programs)


@pytest.fixture
def config(device, helped):
    if torch.cuda.get_device_capability(device) == (9, 0):
        return LaunchConfig(
            128, 256, 64, 16, 8, 3,
            descriptors=True, flatten=True, parts=2, helpers=16,
        )  # fmt: skip
    return POINTERS


def tensors(M, device):
    def draw(*size):
        return torch.randn(size, device=device, dtype=torch.bfloat16)

    return draw(M, K), draw(N, K) / K**0.5, draw(r, K) / K**0.5, draw(N, r), draw(N)


@pytest.mark.parametrize("M", [4096, 8192, 20011])
@pytest.mark.parametrize("which", ["pointers", "shipped"])
def test_against_the_reference(device, config, which, M):
    c = POINTERS if which == "pointers" else config
    x, weight, lora_A, lora_B, bias = tensors(M, device)

    class WithHelpers:
        def call(self, cast):
            return lora_linear(x, weight, lora_A, lora_B, 0.7, bias, config=c)

    def call(run, cast):
        if isinstance(run, WithHelpers):
            return run.call(cast)
        xs, w, A, B, added = map(cast, (x, weight, lora_A, lora_B, bias))
        s = run.shrink(xs, A)
        return run.linear_expand(xs, w, s, B, 0.7, added), s

    assert_contract(call, WithHelpers(), torch.bfloat16)


def test_a_thousand_launches_end_and_give_the_same_bits(device, config):
    x, weight, lora_A, lora_B, _ = tensors(8192, device)
    expected = lora_linear(x, weight, lora_A, lora_B, 0.7, config=config)
    same = torch.ones(len(expected), dtype=torch.bool, device=device)
    for _ in range(1000):
        again = lora_linear(x, weight, lora_A, lora_B, 0.7, config=config)
        pairs = zip(expected, again, strict=True)
        # Looked at on the device, so that launches follow each other.
        same &= torch.stack([(one == two).all() for one, two in pairs])
    assert same.all()


def test_beside_another_stream_that_holds_the_chip(device, config):
    """Not all programs run at once then, on neither stream."""
    x, weight, lora_A, lora_B, _ = tensors(8192, device)
    expected = lora_linear(x, weight, lora_A, lora_B, 0.7, config=config)
    big = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for turn in range(60):
        with torch.cuda.stream(streams[turn % 3]):
            if turn % 3 == 0:
                big @ big
            else:
                results.append(lora_linear(x, weight, lora_A, lora_B, 0.7, config=config))
    torch.cuda.synchronize()
    for found in results:
        for one, two in zip(found, expected, strict=True):
            assert torch.equal(one, two)


def test_graphs_replay_with_their_own_counters(device, config):
    x, weight, lora_A, lora_B, bias = tensors(8192, device)

    def step():
        return lora_linear(x, weight, lora_A, lora_B, 0.7, bias, config=config)

    step()
    torch.cuda.synchronize()
    graphs = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
        graphs.append((graph, found))
    for _ in range(5):
        x.normal_()
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in graphs]
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        expected = step()
        for _, found in graphs:
            for one, two in zip(found, expected, strict=True):
                assert torch.equal(one, two)


def test_a_captured_launch_clears_nothing(device, config, monkeypatch):
    """Its counters were zeroed before the capture."""
    x, weight, lora_A, lora_B, bias = tensors(8192, device)

    def step():
        return lora_linear(x, weight, lora_A, lora_B, 0.7, bias, config=config)

    expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "zeros", None)
        with torch.cuda.graph(graph):
            found = step()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)


def test_64_numbers_of_rows_compile_nothing_new_after_the_first_few(device):
    from lorafast.kernels.linear_expand.kernel import linear_expand_kernel
    from lorafast.kernels.lora_linear.forward import lora_linear_kernel
    from lorafast.kernels.shrink.kernel import shrink_kernel

    from lorafast.backends import forced
    from lorafast.nn import LoRALinear

    kernels = (linear_expand_kernel, lora_linear_kernel, shrink_kernel)

    def compiled():
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    linear = nn.Linear(K, N, device=device, dtype=torch.bfloat16)
    layer = LoRALinear.from_linear(linear, r, alpha=r)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), forced.use_backend("triton"):
        for M in (1, 16, 24, 64, 100, 150, 512, 1000, 2048, 2400, 4096, 8192):
            layer(torch.randn(M, K, device=device, dtype=torch.bfloat16))
        before = compiled()
        for M in torch.randint(1, 8192, (64,), generator=generator).tolist():
            layer(torch.randn(M, K, device=device, dtype=torch.bfloat16))
    assert compiled() == before
