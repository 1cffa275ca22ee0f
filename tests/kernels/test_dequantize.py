"""A quantized weight made dense by one launch, to the bit as its ``rows`` are; the backend around it."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from helpers import covering, skip_unless_usable
from lorafast.kernels.dequantize import dequantize
from quantized_weights import KINDS, draw, same

import lorafast
from lorafast.backends import Refusal, dequantized, registry, workspace
from lorafast.backends.cost import Device, pretending
from lorafast.backends.triton import quantized
from lorafast.core.problem import Problem
from lorafast.nn import LoRALinear
from lorafast.ops.problems import layer_problem
from lorafast.reference import contract

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
H200 = Device.known_by("NVIDIA H200", 90, 132, memory_clock=3.2e9, bus_bits=6144)


@given(
    kind=st.sampled_from(list(KINDS)), N=st.integers(0, 70), K=st.integers(0, 200),
    stored=st.sampled_from(DTYPES), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_to_the_bit_as_rows(device, kind, N, K, stored, dtype):
    weight = draw(kind, N, K, stored, device).to(dtype)
    W = torch.full(weight.shape, float("nan"), dtype=dtype, device=device)
    dequantize(weight, W)
    same(W, weight.dense())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_over_several_programs(device, kind, dtype):
    """That begin and end within rows and blocks, in every format."""
    weight = draw(kind, 96, 131 if kind != "mxfp4" else 160, torch.bfloat16, device).to(dtype)
    W = torch.full((*weight.shape, 2), float("nan"), dtype=dtype, device=device)
    dequantize(weight, W.view(-1)[: weight.numel()].view(weight.shape))
    same(W.view(-1)[: weight.numel()].view(weight.shape), weight.dense())
    assert W.view(-1)[weight.numel() :].isnan().all()


@pytest.fixture
def made_dense(monkeypatch):
    """No product reads codes, however few rows there are."""
    monkeypatch.setattr(quantized, "shares_scales", lambda p, group: False)
    registry.forget_plans()
    yield
    registry.forget_plans()


@pytest.mark.parametrize(
    ("kind", "dtype", "dropout_p", "route"),
    covering(list(KINDS), DTYPES, (0.0, 0.3), ("by the model", "made_dense")),
    ids=str,
)
def test_a_layer_forward_and_backward(request, device, poisoned, kind, dtype, dropout_p, route):
    """All results, by the contract."""
    if route == "made_dense":
        request.getfixturevalue(route)
    skip_unless_usable("triton")
    N, K, M, r = 45, 96, 19, 7
    weight = draw(kind, N, K, torch.bfloat16, device).to(dtype)
    shapes = ((M, K), (r, K), (N, r), (N,), (M, N))
    x, A, B, bias, dy = [
        torch.randn(s, dtype=torch.float64, device=device).to(dtype) for s in shapes
    ]
    seed = torch.tensor([3], device=device)

    def run(layer, W, cast):
        leaves = [t.to(cast).requires_grad_() for t in (x, A, B)]
        y = layer(leaves[0], W, *leaves[1:], 0.5, bias.to(cast), dropout_p=dropout_p, seed=seed)
        gradients = torch.autograd.grad(y, leaves, dy.to(cast))
        return dict(zip(("y", "dx", "dA", "dB"), (y.detach(), *gradients), strict=True))

    with lorafast.use_backend("triton"):
        ours = run(lorafast.ops.lora_linear, weight, dtype)
    eager, ref64 = (
        run(lorafast.reference.lora_linear, weight.dense().to(cast), cast)
        for cast in (dtype, torch.float64)
    )
    reason = contract.why_any_broken(ours, contract.bounds(eager, ref64))
    assert reason is None, reason


@pytest.mark.parametrize(("kind", "dtype"), covering(list(KINDS), DTYPES), ids=str)
def test_a_mixed_batch_forward_and_backward(device, poisoned, kind, dtype):
    """All results, by the contract; W is made dense in memory that layers share."""
    skip_unless_usable("triton")
    N, K, M, r, n = 45, 96, 21, 3, 3
    weight = draw(kind, N, K, torch.bfloat16, device).to(dtype)
    shapes = ((M, K), (n, r, K), (n, N, r), (M, N))
    *drawn, dy = [torch.randn(s, dtype=torch.float64, device=device).to(dtype) for s in shapes]
    adapter_of = [(0, 2, -1)[i % 3] for i in range(M)]

    def run(layer, W, cast):
        leaves = [t.to(cast).requires_grad_() for t in drawn]
        scaling = torch.full((n,), 0.5, dtype=cast, device=device)
        y = layer(leaves[0], W, *leaves[1:], scaling, adapter_of, None)
        gradients = torch.autograd.grad(y, leaves, dy.to(cast))
        return dict(zip(("y", "dx", "dA", "dB"), (y.detach(), *gradients), strict=True))

    workspace.release()
    with lorafast.use_backend("triton"):
        ours = run(lorafast.functional.grouped_lora_linear, weight, dtype)
    assert workspace.held() == N * K * dtype.itemsize
    eager, ref64 = (
        run(lorafast.reference.grouped_lora_linear, weight.dense().to(cast), cast)
        for cast in (dtype, torch.float64)
    )
    reason = contract.why_any_broken(ours, contract.bounds(eager, ref64))
    assert reason is None, reason


@pytest.mark.parametrize("operation", ["grouped_lora_linear", "grouped_lora_linear_backward"])
def test_a_mixed_batch_of_many_rows_is_taken_on_a_gpu(device, operation):
    """Over codes; over a dense weight PyTorch's own calls have it."""
    skip_unless_usable("triton")
    wants = ("y", "s") if operation == "grouped_lora_linear" else ("dx", "dA", "dB")
    weight = draw("nf4", 4096, 4096, torch.bfloat16, torch.device("cpu"))
    problem = Problem(
        operation, 64, 4096, 4096, 8, torch.bfloat16, torch.bfloat16, device, "nf4", wants=wants,
        format_parameters=weight.parameters, adapters=3,
    )  # fmt: skip
    with pretending(H200):
        found = registry.plan_of("triton", problem)
        dense = registry.plan_of("triton", dequantized.dense(problem))
    assert not isinstance(found, Refusal)
    assert found.launches[0].startswith("dequantize: ")
    assert found.seconds > 0
    assert found.ahead is None  # fewer rows may have a launch that reads codes, in less time
    assert (dense.seconds, dense.ahead) == (None, None)


@pytest.fixture
def launches(monkeypatch, made_dense):
    """The weights that were made dense."""
    seen = []
    own = quantized.dequantize

    def counted(weight, W):
        seen.append(weight)
        own(weight, W)

    monkeypatch.setattr(quantized, "dequantize", counted)
    registry.forget_plans()
    yield seen
    registry.forget_plans()


def layers(kind, device):
    made = []
    for _ in range(3):
        weight = draw(kind, 64, 64, torch.float32, device)
        made.append(LoRALinear.from_operand(weight, 2))
        torch.nn.init.normal_(made[-1].lora_B)
    return torch.nn.Sequential(*made)


def test_layers_share_one_dense_weight(device, launches):
    skip_unless_usable("triton")
    model, x = layers("nf4 nested", device), torch.randn(3, 64, device=device, requires_grad=True)
    workspace.release()
    with lorafast.use_backend("triton"):
        model(x).sum().backward()
    assert len(launches) == 6
    assert workspace.held() == 64 * 64 * 4


def test_what_does_not_depend_on_the_weight_does_not_make_it_dense(device, launches):
    skip_unless_usable("triton")
    model, x = layers("fp8 by row", device)[:1], torch.randn(3, 64, device=device)
    with lorafast.use_backend("triton"):
        y = model(x)
        launches.clear()
        y.sum().backward()
    assert not launches
    assert model[0].lora_A.grad is not None


@pytest.mark.parametrize("kind", ["nf4 nested", "int8 by row"])
def test_what_is_kept_under_checkpointing(device, launches, kind):
    """Each layer made dense twice, not three times, for the same bits; and nothing stays."""
    skip_unless_usable("triton")
    model, x = layers(kind, device), torch.randn(3, 64, device=device)
    found, counts = [], []
    for most in (0, 2 * 64 * 64 * 4, 1 << 20):
        twin, leaf = copy.deepcopy(model), x.clone().requires_grad_()
        launches.clear()
        with lorafast.use_backend("triton"):
            y = leaf
            for layer in twin:
                y = checkpoint(layer, y, use_reentrant=False)
            if most:
                with dequantized.keep_dequantized(most):
                    y.sum().backward()
            else:
                y.sum().backward()
        found.append([leaf.grad, *(p.grad for p in twin.parameters() if p.grad is not None)])
        counts.append(len(launches))
    assert counts == [9, 6, 6]
    assert not dequantized._keeping._kept
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_its_time_is_that_of_the_dense_one_and_of_reading_codes(device):
    skip_unless_usable("triton")
    weight = draw("nf4", 256, 512, torch.bfloat16, device)
    x, A, B = (torch.randn(s, device=device).bfloat16() for s in ((4096, 512), (8, 512), (256, 8)))
    with pretending(H200):
        made, dense = (
            registry.plan_of(
                "triton", layer_problem(x, W, A, B, None, False, ("y", "s"), layouts=True)
            )
            for W in (weight, weight.dense())
        )
    assert not isinstance(made, Refusal)
    assert made.seconds > dense.seconds
    assert made.launches[0].startswith("dequantize: ")
    assert made.launches[1:] == dense.launches


@pytest.mark.parametrize(("rows", "of_codes"), [(1, True), (16, True), (256, False), (4096, False)])
def test_few_rows_are_multiplied_by_codes(device, rows, of_codes):
    skip_unless_usable("triton")
    weight = draw("nf4 nested", 4096, 4096, torch.bfloat16, device)
    x, A, B = (
        torch.randn(s, device=device).bfloat16() for s in ((rows, 4096), (8, 4096), (4096, 8))
    )
    with pretending(H200):
        problem = layer_problem(x, weight, A, B, None, False, ("y", "s"), layouts=True)
        made = registry.plan_of("triton", problem)
    assert not isinstance(made, Refusal)
    assert any("W read as codes" in line for line in made.launches) is of_codes
    assert any("dequantize" in line for line in made.launches) is not of_codes
    assert made.seconds > 0


def test_a_weight_stored_in_float64_is_refused(device):
    skip_unless_usable("triton")
    weight = draw("nf4", 4, 64, torch.float64, device).to(torch.float32)
    A, B = torch.randn(2, 64, device=device), torch.randn(4, 2, device=device)
    with (
        lorafast.use_backend("triton"),
        pytest.raises(lorafast.BackendError, match="the kernels round to float16, bfloat16 and"),
    ):
        lorafast.ops.lora_linear(torch.randn(3, 64, device=device), weight, A, B, 1.0)
