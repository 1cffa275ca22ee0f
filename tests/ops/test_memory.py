"""A layer remembers what its tensors are like: it must notice when they are others, or changed."""

import copy
import io
import weakref

import pytest
import torch

from lorafast import reference
from lorafast.nn import LoRALinear
from lorafast.ops import calls


@pytest.fixture(params=["merged", "small", "fused"])
def layer(request, never_small):
    """One that was called, by each kind of plan."""
    sizes = {"merged": (7, 5), "small": (200, 150), "fused": (7, 5)}[request.param]
    if request.param == "fused":
        never_small()
    made = LoRALinear(*sizes, 3)
    torch.nn.init.normal_(made.lora_B)
    call(made)
    return made


def call(layer, **other):
    x = torch.randn(4, layer.in_features).to(**other)
    y = layer(x)
    expected = reference.lora_linear(
        x, layer.weight, layer.lora_A, layer.lora_B, layer.scaling, layer.bias
    )
    torch.testing.assert_close(
        y, expected, rtol=1e-2 if other else 1e-5, atol=1e-2 if other else 1e-5
    )
    return y


def test_a_small_layer_is_read_once(monkeypatch):
    def read(*_):
        raise AssertionError("the tensors were read again")

    layer = LoRALinear(7, 5, 3)
    call(layer)
    monkeypatch.setattr(calls, "like_of", read)
    call(layer)
    layer.lora_A = torch.nn.Parameter(torch.randn_like(layer.lora_A))
    with pytest.raises(AssertionError, match="read again"):
        call(layer)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.double(),
        lambda layer: layer.load_state_dict(
            copy.deepcopy(layer).double().state_dict(), assign=True
        ),
        lambda layer: layer.__dict__.update(copy.deepcopy(layer).double().__dict__),
    ],
    ids=["double", "assigned", "its state replaced"],
)
def test_other_dtypes(layer, change):
    change(layer)
    assert call(layer, dtype=torch.float64).dtype is torch.float64


def test_another_rank_in_place(layer):
    layer.lora_A.data = torch.randn(6, layer.in_features)
    layer.lora_B.data = torch.randn(layer.out_features, 6)
    call(layer)


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
def test_a_shape_that_does_not_fit_in_place_is_named(layer, name):
    parameter = getattr(layer, name)
    parameter.data = torch.randn(parameter.shape[0] + 1, parameter.shape[1] + 1)
    with pytest.raises(ValueError, match="has shape"):
        call(layer)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("weight", (1, 7)), ("weight", (5, 1)), ("weight", (7,)), ("bias", (1,)), ("bias", (1, 5))],
)
def test_a_shape_that_would_be_broadcast_in_place_is_named(name, shape):
    layer = LoRALinear(7, 5, 3)
    call(layer)
    getattr(layer, name).data = torch.randn(shape)
    with pytest.raises(ValueError, match="has shape"):
        call(layer)


def test_adapters_of_another_dtype_in_place(layer):
    for half in (layer.lora_A, layer.lora_B):
        half.data = half.data.double()
    call(layer)


def test_a_layer_changed_in_place_leaves_no_plan_for_others():
    """Of the shapes that it had."""
    layer, other = LoRALinear(512, 300, 3), LoRALinear(512, 300, 3)
    call(other)
    call(layer)
    layer.weight.data, layer.lora_A.data = torch.randn(300, 500), torch.randn(3, 500)
    x = torch.randn(64, 500)
    assert layer(x).shape == (64, 300)
    with pytest.raises(ValueError, match=r"x has shape \[64, 500\], expected \[..., 512\]"):
        other(x)


def test_more_outputs_in_place(layer):
    N = layer.out_features + 1
    layer.weight.data, layer.bias.data = torch.randn(N, layer.in_features), torch.randn(N)
    layer.lora_B.data = torch.randn(N, 3)
    assert call(layer).shape[1] == N


def test_no_more_kinds_of_layers_are_kept_than_calls(monkeypatch):
    monkeypatch.setattr(calls, "_KEPT", 3)
    for r in range(1, 9):
        call(LoRALinear(7, 5, r))
        assert len(calls.likes) <= 3


def test_another_dtype_in_place_is_named(layer):
    layer.lora_A.data = layer.lora_A.data.double()
    with pytest.raises(TypeError, match=r"lora_B is torch\.float32"):
        call(layer)


def test_other_tensors_for_one_call(layer):
    x = torch.randn(4, layer.in_features)
    other = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
    y = torch.func.functional_call(layer, other, (x,))
    expected = reference.lora_linear(
        x, other["weight"], other["lora_A"], other["lora_B"], layer.scaling, other["bias"]
    )
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    call(layer)


def test_copies_and_pickles_have_their_own(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert other._memory is not layer._memory
        assert other._memory.kept == ((), None)
        call(other)


def test_no_tensor_is_kept(layer):
    watched = weakref.ref(layer.weight.untyped_storage())
    layer.weight = torch.nn.Parameter(torch.randn_like(layer.weight), requires_grad=False)
    assert watched() is None
