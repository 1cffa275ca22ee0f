"""Weights made dense for one product at a time: the memory they share, and what checkpointing keeps."""

import threading
import types

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorafast
from lorafast.backends import Plan, composed, dequantized, registry, workspace
from lorafast.backends.aten import Aten
from lorafast.core.problem import DENSE, Problem
from lorafast.nn import LoRALinear
from lorafast.operands import NF4, Int8

N, K, M, r = 24, 32, 5, 2
CPU = torch.device("cpu")


class Dequantizing(Aten):
    """``aten`` over W made dense before; counts how often it is."""

    name = "dequantizing"

    def __init__(self):
        self.made = []

    def plan(self, problem):
        if problem.format == DENSE:
            return super().plan(problem)
        product = composed.plan_or_refusal(dequantized.dense(problem), super().plan)
        assert isinstance(product, Plan)
        return dequantized.plan(problem, self._dequantize, product, "dequantize")

    def _dequantize(self, weight, W):
        self.made.append(W.data_ptr())
        W.copy_(weight.dense())


@pytest.fixture
def backend():
    workspace.release()
    backend = Dequantizing()
    registry.register(backend)
    with lorafast.use_backend(backend.name):
        yield backend
    registry.unregister(backend.name)
    workspace.release()


def make_layer(kind=NF4, dtype=torch.float32, sizes=(N, K)):
    layer = LoRALinear.from_operand(kind.of(torch.randn(sizes, dtype=dtype)), r)
    nn.init.normal_(layer.lora_B)
    return layer


def gradients(layer, x, y):
    trained = [p for p in layer.parameters() if p.requires_grad]
    return torch.autograd.grad(y.square().sum(), (x, *trained))


@pytest.mark.parametrize("kind", [NF4, Int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_product_of_the_dense_weight(backend, never_small, kind, dtype):
    never_small()
    layer = make_layer(kind, dtype)
    x = torch.randn(M, K, dtype=dtype, requires_grad=True)
    found = gradients(layer, x, layer(x))
    dense = LoRALinear.from_linear(nn.Linear(K, N, bias=False, dtype=dtype), r)
    with torch.no_grad():
        dense.weight.copy_(layer.base_weight())
        dense.lora_A.copy_(layer.lora_A)
        dense.lora_B.copy_(layer.lora_B)
    expected = gradients(dense, x, dense(x))
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    assert len(backend.made) == 2


def test_layers_share_one_piece_of_memory(backend):
    layers = nn.Sequential(make_layer(), make_layer(sizes=(2 * N, N)), make_layer(sizes=(K, 2 * N)))
    x = torch.randn(M, K, requires_grad=True)
    layers(x)  # grows to the largest
    backend.made.clear()
    layers(x).sum().backward()
    assert len(backend.made) == 6
    assert len(set(backend.made)) == 1
    assert workspace.held() == 4 * 2 * N * K


def test_what_does_not_depend_on_the_weight_reads_none(backend):
    layer = make_layer()
    layer(torch.randn(M, K)).sum().backward()  # without dx
    assert len(backend.made) == 1


def test_a_plan_says_what_it_launches(backend):
    lines = lorafast.explain(make_layer(), torch.randn(M, K)).layers["(module)"][0].launches
    assert lines[0] == "dequantize"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("most", [None, 4 * N * K, 2 * 4 * N * K])
def test_under_checkpointing_w_is_made_once_a_layer(backend, most, reentrant):
    """Or as often as without, where there is room for less."""
    layers = nn.Sequential(make_layer(), make_layer(sizes=(K, N)))
    x = torch.randn(M, K, requires_grad=True)
    expected = torch.autograd.grad(layers(x).square().sum(), x)[0]
    backend.made.clear()
    y = checkpoint(layers, x, use_reentrant=reentrant).square().sum()
    assert len(backend.made) == 2
    if most is None:
        y.backward()
    else:
        with lorafast.keep_dequantized(most):
            y.backward()
            assert not dequantized._keeping._kept
    assert torch.equal(x.grad, expected)
    # Twice in the forward; then again, and for dx of each layer that wasn't kept.
    kept = 0 if most is None else most // (4 * N * K)
    assert len(backend.made) == 2 + 2 + (2 - kept)


def test_what_is_never_taken_makes_room():
    keeping, nbytes = dequantized._Keeping(), 4 * N * K
    keeping.allow(2 * nbytes)
    weights = [NF4.of(torch.randn(N, K)) for _ in range(3)]
    made = []

    class Recomputes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            for weight in weights:
                made.append(keeping.wants(nbytes))
                keeping.keep(weight, weight.dense())
            made.append(keeping.wants(3 * nbytes))
            return dy

    assert not keeping.wants(nbytes), "nothing is computed again"
    Recomputes.apply(torch.ones(1, requires_grad=True)).backward()
    assert made == [True, True, True, False]
    taken = [keeping.taken(weight, torch.float32) is not None for weight in weights]
    assert taken == [False, True, True]


def test_what_is_kept_is_not_used_once_the_weight_has_changed(backend):
    weight = NF4.of(torch.randn(N, K))
    keeping = dequantized._Keeping()
    keeping.allow(1 << 20)
    keeping.keep(weight, weight.dense())
    weight.tensors()["weight"].zero_()
    assert keeping.taken(weight, torch.float32) is None
    keeping.keep(weight, W := weight.dense())
    assert keeping.taken(NF4.of(torch.randn(N, K)), torch.float32) is None
    assert keeping.taken(weight.to(torch.bfloat16), torch.bfloat16) is None
    assert keeping.taken(weight, torch.float32) is W


def test_nothing_is_kept_after_the_block(backend):
    """Not even where the backward of what was computed again never came."""
    layer = make_layer()
    x = torch.randn(M, K, requires_grad=True)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            layer(x.detach())
            raise RuntimeError("on purpose")

    with lorafast.keep_dequantized(1 << 20):
        with pytest.raises(RuntimeError, match="on purpose"):
            Fails.apply(x).sum().backward()
        assert dequantized._keeping._kept
    assert not dequantized._keeping._kept


@pytest.mark.parametrize("most", [0, -1, 1.5, None])
def test_a_limit_is_a_number_of_bytes(most):
    with pytest.raises(ValueError, match="most_bytes is"), lorafast.keep_dequantized(most):
        pass


class TestWorkspace:
    def test_a_second_matrix_within_the_block_has_memory_of_its_own(self):
        with workspace.borrowed(2, 3, torch.float32, CPU) as one:
            one.fill_(1.0)
            with workspace.borrowed(2, 3, torch.float32, CPU) as two:
                two.fill_(2.0)
            assert (one == 1.0).all()

    def test_it_is_as_large_as_the_largest_and_of_any_dtype(self):
        workspace.release()
        with workspace.borrowed(4, 3, torch.float32, CPU) as large:
            address = large.data_ptr()
        with workspace.borrowed(3, 3, torch.bfloat16, CPU) as small:
            assert (small.shape, small.dtype, small.data_ptr()) == ((3, 3), torch.bfloat16, address)
            assert small.is_contiguous()
        assert workspace.held() == 48
        workspace.release()
        assert workspace.held() == 0

    def test_an_error_gives_it_back(self):
        def fails():
            with workspace.borrowed(4, 3, torch.float32, CPU):
                raise KeyError

        with workspace.borrowed(4, 3, torch.float32, CPU) as one:
            address = one.data_ptr()
        with pytest.raises(KeyError):
            fails()
        with workspace.borrowed(4, 3, torch.float32, CPU) as two:
            assert two.data_ptr() == address

    def test_another_thread_on_a_cpu_has_memory_of_its_own(self):
        seen = []

        def other():
            with workspace.borrowed(4, 3, torch.float32, CPU) as W:
                seen.append(W.data_ptr())

        with workspace.borrowed(4, 3, torch.float32, CPU) as W:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            assert seen != [W.data_ptr()]
        other()
        assert seen[1] == W.data_ptr()

    def test_another_thread_on_a_gpu_waits_until_it_is_free(self, monkeypatch):
        """As one would on a GPU that isn't here: its stream is the same for all threads."""
        gpu = torch.device("cuda", 0)
        empty = torch.empty
        monkeypatch.setattr(workspace, "_is_recorded", lambda device: False)
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=7)
        )
        monkeypatch.setattr(workspace, "lasting", lambda make, device: make())
        monkeypatch.setattr(
            torch, "empty", lambda *size, device, **options: empty(*size, **options)
        )
        seen = []

        def other():
            with workspace.borrowed(4, 3, torch.float32, gpu) as W:
                seen.append(W.clone())

        with workspace.borrowed(4, 3, torch.float32, gpu) as W:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join(0.2)
            assert thread.is_alive()
            W.fill_(1.0)
        thread.join()
        assert (seen[0] == 1.0).all()
        workspace._workspaces.pop((gpu, 7))

    def test_it_serves_within_and_without_inference_mode(self):
        workspace.release()
        with torch.inference_mode(), workspace.borrowed(2, 2, torch.float32, CPU) as W:
            W.fill_(1.0)
        with workspace.borrowed(2, 2, torch.float32, CPU) as W:
            W.fill_(2.0)


def test_a_product_that_pytorch_differentiates_is_refused(backend):
    """It would keep W for the backward, which the next layer overwrites."""
    product = Plan("x", lambda: None, ("launch",), differentiable=True)
    problem = Problem("lora_linear", M, K, N, r, torch.float32, torch.float32, CPU, format="nf4")
    with pytest.raises(ValueError, match="PyTorch would keep W"):
        dequantized.plan(problem, backend._dequantize, product, "dequantize")


def test_a_plan_of_nothing_that_reads_w_is_the_products(backend):
    product = Plan("x", lambda: None, ("launch",))
    problem = Problem("shrink", M, K, 0, r, torch.float32, torch.float32, CPU)
    assert dequantized.plan(problem, backend._dequantize, product, "dequantize") is product
