"""A layer over an operand finds again what served it; what has changed meanwhile is not served so."""

import pytest
import torch
from torch import nn

import lorafast
from lorafast import operands
from lorafast.backends.cpu import native
from lorafast.nn import LoRALinear
from lorafast.ops import stored_lora_linear

pytestmark = pytest.mark.skipif(native.why_not_loaded() is not None, reason="no native CPU kernels")

M, K, N, r = 3, 64, 24, 5


@pytest.fixture
def served(monkeypatch):
    """How many calls were like one before."""
    calls = []
    forward = stored_lora_linear._forward
    monkeypatch.setattr(
        stored_lora_linear, "_forward", lambda *given: calls.append(1) or forward(*given)
    )
    return calls


def layer_over(format, dtype=torch.float32):
    layer = LoRALinear.from_operand(
        operands.quantize(torch.randn(N, K).to(dtype), format), r, bias=torch.randn(N).to(dtype)
    )
    torch.nn.init.normal_(layer.lora_B)
    return layer


def outputs(layer, x):
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y.sin().sum(), (x, layer.lora_A, layer.lora_B))]


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8", "fp8"])
@pytest.mark.parametrize("leading", [(), (M,), (2, M)], ids=str)
def test_the_second_call_has_the_bits_of_the_first(served, format, leading):
    layer, x = layer_over(format), torch.randn(*leading, K)
    first = outputs(layer, x)
    assert not served
    assert all(map(torch.equal, outputs(layer, x), first))
    with torch.no_grad():
        assert torch.equal(layer(x), first[0])
    assert len(served) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.load_state_dict(layer_over("int8").state_dict()),
        lambda layer: layer.load_state_dict(layer_over("int8").state_dict(), assign=True),
        lambda layer: (
            setattr(layer, "lora_A", torch.nn.Parameter(torch.randn(r + 2, K)))
            or setattr(layer, "lora_B", torch.nn.Parameter(torch.randn(N, r + 2)))
        ),
        lambda layer: layer.to(torch.bfloat16),
        lambda layer: (
            setattr(layer.lora_B, "data", torch.randn(N, r).bfloat16())
            or setattr(layer.lora_A, "data", torch.randn(r, K).bfloat16())
        ),
        lambda layer: setattr(layer, "scaling", 0.25),
        lambda layer: setattr(layer, "bias", None),
    ],
    ids=["loaded", "assigned", "rank", "cast", "cast in place", "scaling", "bias"],
)
def test_what_changes_between_calls_counts(change):
    layer, x = layer_over("int8"), torch.randn(M, K)
    for _ in range(2):
        layer(x)
    change(layer)
    x = x.to(layer.operand().dtype)
    found = outputs(layer, x)
    A, B, bias = layer.lora_A, layer.lora_B, layer.bias
    leaf = x.detach().requires_grad_()
    y = lorafast.functional.lora_linear(leaf, layer.operand(), A, B, layer.scaling, bias)
    expected = [y, *torch.autograd.grad(y.sin().sum(), (leaf, A, B))]
    for name, one, two in zip(("y", "dx", "dA", "dB"), found, expected, strict=True):
        assert torch.equal(one, two), name


def test_what_is_refused_stays_refused():
    layer, x = layer_over("int8"), torch.randn(M, K)
    for _ in range(2):
        layer(x)
    with pytest.raises(ValueError, match="x has shape"):
        layer(x[:, :7])
    with pytest.raises(TypeError, match="x"):
        layer(x.int())
    layer.lora_A.data = torch.randn(r, K - 1)
    with pytest.raises(ValueError, match="lora_A"):
        layer(x)
    layer.lora_A.data = torch.randn(r, K)
    layer(x)
    layer.SCB.requires_grad_()
    with pytest.raises(ValueError, match=r"SCB|weight"):
        layer(x)


def test_what_surrounds_a_call_is_seen(served):
    layer, x = layer_over("int8"), torch.randn(M, K)
    layer(x)
    with lorafast.use_backend("reference"):
        by_reference = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    mapped = torch.vmap(layer)(x)
    layer.dropout = 0.5
    layer(x)
    assert not served
    torch.testing.assert_close(mapped, by_reference)
    layer.eval()
    layer(x)
    assert served


@pytest.mark.parametrize("eager_first", [False, True])
def test_layers_compiled_one_by_one_are_one_graph(eager_first):
    """No address is a guard."""
    from torch._dynamo.testing import CompileCounter

    blocks = [quantized_layer() for _ in range(3)]
    x = torch.randn(4, 64)
    if eager_first:
        for block in blocks * 2:
            block(x)
    counter = CompileCounter()
    for block in blocks:
        block.compile(backend=counter)
        block(x)
    assert counter.frame_count == 1


def test_a_nested_input_is_served_as_by_a_dense_layer():
    layer = quantized_layer()
    parts = [torch.randn(n, 64) for n in (2, 3)]
    y = layer(torch.nested.nested_tensor(parts))
    for one, part in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(one, layer(part), rtol=1e-4, atol=1e-4)


def quantized_layer():
    model = nn.Sequential(lorafast.quantize(nn.Linear(64, 32).requires_grad_(False), "nf4"))
    layer = lorafast.adapt(model, 4, ["0"])[0]
    nn.init.normal_(layer.lora_B)
    return layer
