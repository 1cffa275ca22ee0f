"""``scale ⊙ y + beside`` against PyTorch's own operations, its results and what it moves."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import lorafast
from lorafast.ops import scaled as module
from lorafast.ops.scaled import _plain, scaled

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def always_large(monkeypatch):
    monkeypatch.setattr(module, "_pays", lambda y, scale: True)


def drawn(shape, dtype, beside, scale_dtype=torch.float32):
    N = shape[-1]
    given = [torch.randn(shape).to(dtype), torch.randn(N).to(scale_dtype)]
    if beside is not None:
        given.append(torch.randn(N if beside == "[N]" else shape).to(dtype))
    return [t.requires_grad_() for t in given]


besides = pytest.mark.parametrize("beside", [None, "[N]", "[..., N]"], ids=str)
shapes = pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (0, 7), (4, 1)], ids=str)


@besides
@shapes
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_its_results_are_pytorchs(always_large, poisoned, shape, dtype, beside):
    """To the bit: y and its gradient are float32 products rounded once, the others sums of them."""
    given, dy = drawn(shape, dtype, beside), torch.randn(shape).to(dtype)
    y = scaled(*given)
    assert type(y.grad_fn).__name__ == "_ScaledBackward"
    expected = _plain(*given, *[None] * (3 - len(given)))
    assert torch.equal(y, expected)
    found, right = (torch.autograd.grad(out, given, dy) for out in (y, expected))
    assert all(map(torch.equal, found[:1], right[:1]))
    for one, two, t in zip(found[1:], right[1:], given[1:], strict=True):
        assert one.dtype is t.dtype
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_a_subset_of_gradients(always_large, needs):
    given = [t.detach() for t in drawn((5, 7), torch.bfloat16, "[N]")]
    leaves = [given[i].requires_grad_() for i in needs]
    dy = torch.randn(5, 7).bfloat16()
    found, right = (torch.autograd.grad(f(*given), leaves, dy) for f in (scaled, _plain))
    torch.testing.assert_close(found, right)


@besides
def test_second_derivatives(always_large, beside):
    """A float32 y with a float64 scale is as a 16-bit one with a float32 scale."""
    given = drawn((5, 7), torch.float32, beside, torch.float64)
    dy = torch.randn(5, 7, requires_grad=True)

    def second(f):
        first = torch.autograd.grad(f(*given), given, dy, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [*given[:2], dy])

    none = [None] * (3 - len(given))
    torch.testing.assert_close(second(scaled), second(lambda *t: _plain(*t, *none)))


def test_batched_gradients(always_large):
    given = drawn((5, 7), torch.bfloat16, "[N]")
    dys = torch.randn(3, 5, 7).bfloat16()
    found = torch.autograd.grad(scaled(*given), given, dys, is_grads_batched=True)
    right = [torch.autograd.grad(_plain(*given), given, dy) for dy in dys]
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*right, strict=True))))


@besides
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_without_gradients_y_is_written_over(dtype, beside):
    with torch.no_grad():
        given = drawn((5, 7), dtype, beside)
        expected = _plain(*given, *[None] * (3 - len(given)))
        y = scaled(*given)
        assert y.data_ptr() == given[0].data_ptr()
        assert torch.equal(y, expected)


def test_under_transforms(always_large):
    given = [t.detach() for t in drawn((5, 7), torch.bfloat16, "[N]")]
    found = torch.vmap(scaled, (0, None, None))(*given)
    assert torch.equal(found, _plain(*given))


def passes(call):
    """How many operations on a tensor of y's size PyTorch is asked for, each a launch on a GPU."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        call()
    names = ("aten::mul", "aten::addcmul", "aten::to", "aten::sum")
    return sum(
        e.name in names
        and [64, 96] in e.input_shapes
        and (e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::"))
        for e in seen.events()
    )


@pytest.mark.parametrize(("pays", "expected"), [(True, 4), (False, 7)], ids=["large", "small"])
def test_passes_over_y(monkeypatch, pays, expected):
    monkeypatch.setattr(module, "_pays", lambda y, scale: pays)
    y, scale = drawn((64, 96), torch.bfloat16, None)
    dy = torch.randn(64, 96).bfloat16()

    def call():
        torch.autograd.grad(scaled(y, scale), (y, scale), dy)

    assert passes(call) == expected


def test_one_pass_without_gradients():
    y, scale = (t.detach() for t in drawn((64, 96), torch.bfloat16, None))
    with torch.no_grad():
        assert passes(lambda: scaled(y, scale)) == 1


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_in_a_layer(monkeypatch, dropout_p):
    def outputs():
        torch.manual_seed(3)
        layer = lorafast.nn.LoRALinear(
            48, 32, r=4, use_dora=True, dropout=dropout_p, dtype=torch.bfloat16,
            adapter_dtype=torch.float32,
        )  # fmt: skip
        torch.nn.init.normal_(layer.lora_B)
        x = torch.randn(6, 48).bfloat16().requires_grad_()
        y = layer(x)
        names = [x, layer.lora_A, layer.lora_B, layer.lora_magnitude]
        return y.detach(), *torch.autograd.grad(y, names, torch.ones_like(y))

    expected = outputs()
    monkeypatch.setattr(module, "_pays", lambda y, scale: True)
    torch.testing.assert_close(outputs(), expected)
