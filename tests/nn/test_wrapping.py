"""What a LoRALinear takes over from the layer that it wraps, and gives back when it is merged."""

import copy
import functools
import gc
import pickle
import re
import weakref

import pytest
import torch
from torch import nn

import lorafast
from lorafast.nn import LoRALinear


class Scaled(nn.Linear):
    """A subclass with state of every kind and the forward of nn.Linear."""

    def __init__(self):
        super().__init__(7, 5)
        self.register_buffer("mean", torch.arange(5.0))
        self.register_buffer("hidden", torch.ones(1), persistent=False)
        self.gate = nn.Parameter(torch.ones(3))
        self.norm = nn.LayerNorm(5)
        self.note = {"a": 1}

    def reset_parameters(self):
        nn.init.ones_(self.weight)

    def extra_repr(self):
        return "scaled"


def wrapped(linear=None):
    linear = Scaled() if linear is None else linear
    layer = LoRALinear.from_linear(linear, 2)
    nn.init.normal_(layer.lora_B)
    return linear, layer


class TestState:
    def test_attributes_buffers_parameters_and_submodules_are_kept(self):
        linear, layer = wrapped()
        assert layer.note is linear.note
        assert layer.mean is linear.mean
        assert layer.gate is linear.gate
        assert layer.norm is linear.norm
        assert not layer.gate.requires_grad
        assert set(dict(layer.named_buffers())) == {"mean", "hidden"}

    def test_the_state_dict_is_the_plain_one_and_the_adapter(self):
        linear, layer = wrapped()
        assert set(layer.state_dict()) == set(linear.state_dict()) | {"lora_A", "lora_B"}
        assert "hidden" not in layer.state_dict()
        assert layer.load_state_dict(Scaled().state_dict()) == ([], [])

    def test_merging_gives_the_class_and_all_it_held_back(self):
        linear, layer = wrapped()
        layer.later = "set on the LoRA layer"
        x = torch.randn(3, 7)
        expected = layer(x)
        plain = lorafast.merge(nn.Sequential(layer))[0]
        assert type(plain) is Scaled
        assert (plain.note, plain.later) == (linear.note, layer.later)
        assert plain.mean is linear.mean
        assert plain.gate is linear.gate
        assert plain.norm is linear.norm
        assert plain.state_dict().keys() == linear.state_dict().keys()
        assert repr(plain) == repr(linear)
        assert not {"r", "lora_A", "_alpha", "merged", "_plain_class"} & set(vars(plain))
        torch.testing.assert_close(plain(x), expected)

    def test_attributes_of_a_parameter_are_kept(self):
        linear = nn.Linear(7, 5)
        linear.weight.tag = "kept"
        linear._is_hf_initialized = True
        _, layer = wrapped(linear)
        assert layer.weight.tag == "kept"
        assert layer._is_hf_initialized

    @pytest.mark.parametrize(
        "clone",
        [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
        ids=["deepcopy", "pickle"],
    )
    def test_copies(self, clone):
        _, layer = wrapped()
        twin = clone(layer)
        assert type(twin.to_linear()) is Scaled
        assert torch.equal(twin.mean, layer.mean)
        assert twin.mean is not layer.mean

    def test_a_layer_of_an_earlier_release_merges_into_a_linear(self):
        _, layer = wrapped(nn.Linear(7, 5))
        del layer._plain_class
        assert type(layer.to_linear()) is nn.Linear


class TestStateDictHooks:
    """As on the plain layer: the module that they are called with is the one that is in the model."""

    def test_they_go_to_the_lora_layer_and_back(self):
        called = []
        linear = nn.Linear(7, 5)
        linear.register_state_dict_pre_hook(lambda m, prefix, keep: called.append(("pre", m)))
        linear.register_state_dict_post_hook(lambda m, *_: called.append(("post", m)))
        linear.register_load_state_dict_pre_hook(lambda m, *_: called.append(("load pre", m)))
        handle = linear.register_load_state_dict_post_hook(lambda m, _: called.append(("load", m)))
        _, layer = wrapped(linear)
        layer.load_state_dict(layer.state_dict())
        assert called == [(name, layer) for name in ("pre", "post", "load pre", "load")]
        called.clear()
        model = nn.Sequential(layer)
        state = nn.Sequential(nn.Linear(7, 5)).state_dict()
        (plain,) = lorafast.merge(model)
        handle.remove()
        model.load_state_dict(state)
        model.state_dict()
        assert called == [(name, plain) for name in ("load pre", "pre", "post")]

    def test_an_old_key_is_renamed_in_a_plain_checkpoint(self):
        linear = nn.Linear(7, 5)

        def rename(module, state, prefix, *_):
            state[prefix + "weight"] = state.pop(prefix + "kernel")

        linear.register_load_state_dict_pre_hook(rename)
        model = nn.Sequential(linear)
        model[0] = wrapped(linear)[1]
        kernel = torch.randn(5, 7)
        assert model.load_state_dict({"0.kernel": kernel, "0.bias": torch.zeros(5)}) == ([], [])
        assert torch.equal(model[0].weight, kernel)

    def test_the_wrapped_layer_may_be_gone(self):
        def make():
            linear = nn.Linear(7, 5)
            linear.register_load_state_dict_pre_hook(lambda *_: None)
            return LoRALinear.from_linear(linear, 2), weakref.ref(linear)

        layer, linear = make()
        gc.collect()
        state = {name: torch.randn_like(value) for name, value in layer.state_dict().items()}
        layer.load_state_dict(state)
        assert linear() is None
        assert torch.equal(layer.weight, state["weight"])


class OwnLoading(nn.Linear):
    def _load_from_state_dict(self, *arguments):
        super()._load_from_state_dict(*arguments)


class AlwaysEval(nn.Linear):
    def train(self, mode=True):
        return super().train(False)


def _replaced():
    linear = nn.Linear(7, 5)
    linear.forward = functools.partial(nn.Linear.forward, linear)
    return linear


def _compiled():
    linear = nn.Linear(7, 5)
    linear.compile()
    return linear


def _with(**attributes):
    linear = nn.Linear(7, 5)
    for name, value in attributes.items():
        setattr(linear, name, value)
    return linear


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: OwnLoading(7, 5),
            "its class OwnLoading has a _load_from_state_dict of its own, which would be lost",
        ),
        (lambda: AlwaysEval(7, 5), "its class AlwaysEval has a train of its own"),
        (_replaced, "its forward is replaced on the instance (Linear), which would be lost"),
        (_compiled, "it was compiled in place: adapt it before Module.compile()"),
        (lambda: _with(alpha=3), "its attribute 'alpha' has the name of one that a LoRALinear has"),
        (lambda: _with(to=print), "its attribute 'to' has the name"),
        (lambda: _with(dropout=nn.Dropout(0.5)), "its attribute 'dropout' has the name"),
    ],
    ids=["loading", "train", "forward", "compiled", "attribute", "method", "submodule"],
)
def test_what_would_be_lost_is_refused(make, sentence):
    linear = make()
    before = dict(vars(linear))
    with pytest.raises(TypeError, match=re.escape(sentence)):
        LoRALinear.from_linear(linear, 2)
    assert vars(linear) == before
    assert linear.weight.requires_grad


def test_a_forward_that_hooks_left_behind_is_that_of_the_class():
    linear = nn.Linear(7, 5)
    linear.forward = linear.forward  # as Accelerate does when it removes a hook
    _, layer = wrapped(linear)
    assert "forward" not in vars(layer)
    layer.forward = layer.forward
    assert "forward" not in vars(layer.to_linear())


def test_a_forward_replaced_on_a_lora_layer_is_not_lost_in_merging():
    model = nn.Sequential(wrapped(nn.Linear(7, 5))[1])
    model[0].forward = lambda x: 2 * LoRALinear.forward(model[0], x)
    with pytest.raises(ValueError, match=r"^0 can't be merged: its forward is replaced on the"):
        lorafast.merge(model)
    assert isinstance(model[0], LoRALinear)
