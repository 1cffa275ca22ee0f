"""The format ``w8a8``: activations rounded to fp8 in the forward, and a backward as if they weren't."""

import pytest
import torch
from torch import nn

import lorafast
from lorafast import functional, operands, ops
from lorafast.core.errors import BackendError
from lorafast.nn import LoRALinear
from lorafast.operands import FP8, W8A8
from lorafast.reference import contract

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
M, r = 6, 4
SIZES = [(48, 64), (33, 50), (16, 16), (1, 5)]
"""Of [N, K]: of the first and the third the vendor's scaled product is used."""


def draw(N, K, dtype=torch.float32):
    x, A, B, bias = (
        torch.randn(size, dtype=dtype, requires_grad=True)
        for size in ((M, K), (r, K), (N, r), (N,))
    )
    return x, W8A8.of(torch.randn(N, K, dtype=dtype)), A, B, bias


def by_hand(x, dtype):
    """x as e4m3 codes times their row's scale, in ``dtype``."""
    scale = x.detach().float().abs().amax(1, keepdim=True) / 448
    return (x.detach().float() / scale).to(torch.float8_e4m3fn).to(dtype) * scale.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", ["auto", "reference", "aten", "cpu"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_it_keeps_the_contract(dtype, size, backend, dropout_p):
    x, weight, A, B, bias = draw(*size, dtype)
    seed = torch.tensor([7])

    def reference(dtype):
        a, w, b = (t.detach().to(dtype) for t in (A, weight.dense(), B))
        low = lorafast.reference.shrink(x.detach().to(dtype), a, dropout_p, seed)
        rounded = by_hand(x, dtype)
        return lorafast.reference.linear_expand(rounded, w, low, b, 0.5, bias.detach().to(dtype))

    with lorafast.use_backend(backend):
        y = ops.lora_linear(x, weight, A, B, 0.5, bias, dropout_p, seed if dropout_p else None)
    assert contract.why_broken(y.detach(), reference(dtype), reference(torch.float64)) is None


@pytest.mark.parametrize("backend", ["reference", "aten"])
def test_gradients_are_those_of_the_same_weight_without_rounding(backend):
    """A straight-through estimator: bit for bit those of ``fp8``, for they never see the rounded x."""
    x, weight, A, B, bias = draw(48, 64)
    plain = FP8(weight.tensors(), weight.dtype)
    found = []
    with lorafast.use_backend(backend):
        for operand in (weight, plain):
            y = functional.lora_linear(x, operand, A, B, 0.5, bias)
            found.append(torch.autograd.grad(y, (x, A, B, bias), torch.ones_like(y)))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_the_product_is_the_vendors_where_that_serves_it(monkeypatch):
    calls = []
    scaled = torch._scaled_mm

    def spy(*arguments, **options):
        calls.append(arguments[0].dtype)
        return scaled(*arguments, **options)

    monkeypatch.setattr(torch, "_scaled_mm", spy)
    for size, dtype, served in (
        ((48, 64), torch.bfloat16, True),
        ((48, 64), torch.float32, False),
        ((33, 64), torch.bfloat16, False),
        ((48, 50), torch.bfloat16, False),
    ):
        x, weight, *_ = draw(*size, dtype)
        calls.clear()
        y = operands.linear(x.detach(), weight)
        assert calls == [torch.float8_e4m3fn] * served
        ref64 = by_hand(x, torch.float64) @ weight.dense().double().t()
        eager = by_hand(x, dtype) @ weight.dense().t()
        assert contract.why_broken(y, eager, ref64) is None


def test_one_scale_of_all_of_w():
    codes = W8A8.of(torch.randn(48, 64)).tensors()["weight"]
    weight = W8A8({"weight": codes, "scale": torch.tensor(0.37)}, torch.bfloat16)
    x = torch.randn(M, 64, dtype=torch.bfloat16)
    ref64 = by_hand(x, torch.float64) @ weight.dense().double().t()
    eager = by_hand(x, torch.bfloat16) @ weight.dense().t()
    assert contract.why_broken(operands.linear(x, weight), eager, ref64) is None


def test_rows_of_zeros_and_of_nan_stay_so():
    weight = W8A8.of(torch.randn(48, 64, dtype=torch.bfloat16))
    x = torch.randn(M, 64, dtype=torch.bfloat16)
    x[1], x[3, 5] = 0.0, torch.nan
    y = operands.linear(x, weight)
    assert (y[1] == 0).all()
    assert y[3].isnan().all()
    assert y[[0, 2, 4, 5]].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "aten"])
def test_mixed_batches_round_the_same(backend):
    x, weight, A, B, bias = draw(33, 50)
    As, Bs = torch.stack((A, -A)), torch.stack((B, B))
    with lorafast.use_backend(backend):
        y = functional.grouped_lora_linear(x, weight, As, Bs, 0.5, [0, 1, -1, 0, -1, 1], bias)
    rounded, W = by_hand(x, torch.float64), weight.dense().double()
    sign = torch.tensor([1.0, -1.0, 0.0, 1.0, 0.0, -1.0], dtype=torch.float64)[:, None]
    ref64 = rounded @ W.t() + bias + 0.5 * sign * (x.double() @ A.double().t()) @ B.double().t()
    eager = (
        by_hand(x, torch.float32) @ weight.dense().t()
        + bias
        + 0.5 * sign.float() * ((x @ A.t()) @ B.t())
    )
    assert contract.why_broken(y.detach(), eager.detach(), ref64.detach()) is None


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_layer_trains_compiles_and_differentiates_twice(use_dora):
    x, weight, *_ = draw(48, 64)
    layer = LoRALinear.from_operand(weight, r, use_dora=use_dora)
    nn.init.normal_(layer.lora_B)
    y = layer(x)
    torch.compiler.reset()  # other tests compile layers too, and there is a limit
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    eager = y.detach()
    assert contract.why_broken(compiled.detach(), eager, eager.double()) is None
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    dx.square().sum().backward()
    assert layer.lora_A.grad.isfinite().all()
    assert layer.lora_A.grad.norm() > 0
    mapped = torch.func.vmap(layer)(x.detach()[:, None])[:, 0]
    assert contract.why_broken(mapped.detach(), eager, eager.double()) is None


def test_kernels_of_fp8_refuse_it():
    """They would compute other numbers."""
    x, weight, A, B, _ = draw(48, 64)
    with lorafast.use_backend("triton"), pytest.raises(BackendError, match="w8a8"):
        functional.lora_linear(x, weight, A, B, 0.5)


class TestAQuantizedModel:
    def make(self, dtype=torch.bfloat16):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(64, 48, dtype=dtype))
        return lorafast.quantize(model, "fp8", activation="fp8"), model

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_frozen_layer_keeps_the_contract(self, dtype):
        model, _ = self.make(dtype)
        layer = model[0]
        weight = layer.frozen_operand()
        assert type(weight) is W8A8
        x = torch.randn(M, 64, dtype=dtype, requires_grad=True)
        y = model(x)
        W, bias = weight.dense(), layer.bias
        ref64 = by_hand(x, torch.float64) @ W.double().t() + bias.double()
        eager = torch.nn.functional.linear(by_hand(x, dtype), W, bias)
        assert contract.why_broken(y.detach(), eager, ref64) is None
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, dy)
        assert contract.why_broken(dx, dy @ W, dy.double() @ W.double()) is None

    def test_derivatives_of_derivatives_are_not_rounded(self):
        model, _ = self.make(torch.float32)
        x, dy = torch.randn(M, 64, requires_grad=True), torch.randn(M, 48, requires_grad=True)
        (dx,) = torch.autograd.grad(model(x), x, dy, create_graph=True)
        g = torch.randn_like(dx)
        (found,) = torch.autograd.grad(dx, dy, g)
        W = model[0].dense_weight()
        assert contract.why_broken(found, g @ W.t(), g.double() @ W.double().t()) is None

    def test_it_compiles_is_mapped_and_adapted(self):
        model, _ = self.make(torch.float32)
        x = torch.randn(M, 64)
        y = model(x)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        assert contract.why_broken(compiled, y, y.double()) is None
        mapped = torch.func.vmap(model)(x[:, None])[:, 0]
        assert contract.why_broken(mapped, y, y.double()) is None
        lorafast.adapt(model, r=2)
        assert type(operands.build(model[0]._stored(), model[0]._description)) is W8A8
        assert contract.why_broken(model(x).detach(), y, y.double()) is None

    @pytest.mark.parametrize(
        ("format", "activation"), [("nf4", "fp8"), ("int8", "fp8"), ("fp8", "int8"), ("fp8", "")]
    )
    def test_no_other_activations_are_rounded(self, format, activation):
        model = nn.Sequential(nn.Linear(4, 4))
        with pytest.raises(ValueError, match=f"activation is '{activation}' and format '{format}'"):
            lorafast.quantize(model, format, activation=activation)
        assert type(model[0]) is nn.Linear
