"""What about a layer makes PEFT serve it: that it did, that it says why, and what came out."""

import copy
import functools

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as stock_layers
from peft.tuners.lora.variants import ALoraLinearVariant
from peft_twins import (
    K,
    N,
    OwnTensor,
    assert_same,
    hooked,
    layer_of,
    peft_model,
    stock_and_fast,
)
from torch import nn

import lorafast
from lorafast.integrations.peft import layers as fast_layers


class Scaled(nn.Linear):
    """Not exactly an nn.Linear."""

    def forward(self, x):
        return 2 * super().forward(x)


CHANGES = {}
"""By name, what is done to a model's layer, and words of the reason for which PEFT then serves it."""


def change(reason):
    def decorate(function):
        CHANGES[function.__name__] = function, reason
        return function

    return decorate


@change("its adapters are disabled")
def disable(layer):
    layer.enable_adapters(False)


@change("adapters are merged into its weight: 'default'")
def merge(layer):
    layer.merge()


@change("none of its adapters is active")
def deactivate(layer):
    layer._active_adapter = []


@change("its base layer has hooks")
def hook_before_the_base(layer):
    layer.base_layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))


@change("adapter 'default' has hooks")
def hook_after_B(layer):
    hooked(layer.lora_B["default"])


@change("adapter 'default' has hooks")
def hook_after_the_backward_of_A(layer):
    layer.lora_A["default"].register_full_backward_hook(lambda module, dx, dy: (3 * dx[0],))


@change("adapter 'default' has hooks")
def hook_the_dropout(layer):
    hooked(layer.lora_dropout["default"])


@change("its base layer has a forward of its own")
def replace_the_forward_of_the_base(layer):
    layer.base_layer.forward = lambda x: torch.zeros(*x.shape[:-1], N)


@change("its base layer has a hook of accelerate's")
def hook_of_accelerate(layer):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Twice(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    add_hook_to_module(layer.base_layer, Twice())


@change("its base layer is a Scaled, not exactly an nn.Linear or a Conv1D")
def subclass_the_base(layer):
    layer.base_layer.__class__ = Scaled


@change("its base layer is a ParametrizedLinear")
def parametrize_the_base(layer):
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", Halved())


@change("adapter 'default' is made of ParametrizedLinear and Linear")
def parametrize_A(layer):
    nn.utils.parametrizations.weight_norm(layer.lora_A["default"])


@change("adapter 'default' has hooks")
def hook_before_the_backward_of_A(layer):
    layer.lora_A["default"].register_full_backward_pre_hook(lambda module, dy: (2 * dy[0],))


@change("its base layer has no bias of its own")
def bias_in_a_buffer(layer):
    bias = layer.base_layer.bias.detach()
    del layer.base_layer.bias
    layer.base_layer.register_buffer("bias", bias)


@change("the dropout of adapter 'default' changes its input")
def dropout_in_place(layer):
    layer.lora_dropout["default"] = nn.Dropout(0.5, inplace=True).eval()


@change("its base layer has a tensor parallel plan")
def device_mesh(layer):
    layer.base_layer._hf_device_mesh = None


@change("its base layer has no weight of its own")
def weight_norm(layer):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer.base_layer)


@change("its base layer has a tensor parallel plan")
def tensor_parallel(layer):
    layer.base_layer._hf_tp_plan = "colwise"


@change("its base layer has a OwnTensor, not a plain tensor")
def subclass_of_tensor(layer):
    weight = layer.base_layer.weight.detach().as_subclass(OwnTensor)
    layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)


@change("the dropout of adapter 'default' is a AlphaDropout")
def another_dropout(layer):
    layer.lora_dropout["default"] = nn.AlphaDropout(0.0)


@change("the scaling of adapter 'default' has the shape [1]")
def scaling_with_a_dimension(layer):
    layer.scaling["default"] = torch.tensor([0.5])


@change("its base layer is torch.sparse_csr")
def sparse_weight(layer):
    weight = layer.base_layer.weight.detach()
    layer.base_layer.weight = nn.Parameter(weight.to_sparse_csr(), requires_grad=False)


class OwnVariant(ALoraLinearVariant):
    """Not exactly aLoRA."""


@change("adapter 'default' is of another kind: OwnVariant")
def another_variant(layer):
    layer.lora_variant["default"] = OwnVariant()


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_about_a_layer(name, served_by_peft):
    do, reason = CHANGES[name]
    stock, fast = stock_and_fast(peft_model(), do)
    (why,) = lorafast.explain(fast).layers.values()
    assert reason in why
    assert_same(stock, fast, torch.randn(5, K))
    assert len(served_by_peft) == 1


@pytest.mark.parametrize(
    "kind", ["forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_other_hooks_on_every_module(kind, served_by_peft):
    stock, fast = stock_and_fast(peft_model(), lambda layer: None)
    seen = []
    register = getattr(nn.modules.module, f"register_module_{kind}")
    handle = register(lambda module, *_: seen.append(type(module)))
    try:
        assert_same(stock, fast, torch.randn(5, K))
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 6
    assert len(served_by_peft) == 1


def test_hooks_on_every_module(served_by_peft):
    stock, fast = stock_and_fast(peft_model(), lambda layer: None)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        (why,) = lorafast.explain(fast).layers.values()
        assert why == "hooks are registered for all modules"
        assert_same(stock, fast, torch.randn(5, K))
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 6
    assert len(served_by_peft) == 1


@pytest.mark.parametrize("wrapped", [False, True], ids=["replaced", "wrapped"])
def test_a_forward_of_nn_Linear_that_is_not_its_own(wrapped, served_by_peft, monkeypatch):
    stock, fast = stock_and_fast(peft_model(), lambda layer: None)

    def twice(self, x):
        return 2 * x @ self.weight.t()

    forward = functools.wraps(nn.Linear.forward)(twice) if wrapped else twice
    monkeypatch.setattr(nn.Linear, "forward", forward)
    assert "the forward of Linear was replaced" in str(lorafast.explain(fast))
    assert_same(stock, fast, torch.randn(5, K))
    assert len(served_by_peft) == 1


def test_a_hook_on_the_magnitude_of_dora(served_by_peft):
    def hook(layer):
        magnitude = layer.lora_magnitude_vector["default"]
        magnitude.register_forward_hook(lambda module, args, output: output + 1.0)

    stock, fast = stock_and_fast(peft_model(use_dora=True), hook)
    assert "the magnitude of adapter 'default' has hooks" in str(lorafast.explain(fast))
    assert_same(stock, fast, torch.randn(5, K))
    assert len(served_by_peft) == 1


@pytest.mark.parametrize(
    "shapes", [((4, K + 1), (N, 4)), ((4, K), (N, 5)), ((0, K), (N, 0))], ids=str
)
def test_factors_that_do_not_fit(shapes, served_by_peft):
    def replace(layer):
        for factor, shape in zip((layer.lora_A, layer.lora_B), shapes, strict=True):
            factor["default"].weight = nn.Parameter(torch.ones(shape))

    def outcome(model):
        try:
            return model(x).sum().item()
        except RuntimeError as error:
            return str(error)

    stock, fast = stock_and_fast(peft_model(), replace)
    x = torch.randn(5, K)
    assert outcome(fast) == outcome(stock)
    assert len(served_by_peft) == 1


def test_a_magnitude_of_another_class(served_by_peft):
    def replace(layer):
        magnitude = layer.lora_magnitude_vector["default"]
        magnitude.__class__ = type("Own", (type(magnitude),), {})

    stock, fast = stock_and_fast(peft_model(use_dora=True), replace)
    assert "the magnitude of adapter 'default' is a Own" in str(lorafast.explain(fast))
    assert_same(stock, fast, torch.randn(5, K))
    assert len(served_by_peft) == 1


def test_dropout_of_dora_follows_the_layer():
    """Not the dropout's own mode, as PEFT has it."""
    model = peft_model(use_dora=True, lora_dropout=0.5)
    fast = lorafast.accelerate(copy.deepcopy(model), quiet=True)
    x = torch.randn(5, K)
    for training, dropout_training in ((False, True), (True, False)):
        found = []
        for tested in (model, fast):
            layer = layer_of(tested).train(training)
            layer.lora_dropout.train(dropout_training)
            torch.manual_seed(0)
            found.append(tested(x))
        torch.testing.assert_close(*found)


def test_layers_of_other_types_stay_as_they_are(monkeypatch):
    for known in (fast_layers.FAST, fast_layers.LAYERS):
        monkeypatch.delitem(known, stock_layers.Conv2d)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.linear = nn.Linear(5, 6)

        def forward(self, x):
            return self.conv(x).sum() + self.linear.weight.sum()

    model = get_peft_model(Net(), LoraConfig(target_modules=["conv", "linear"]))
    lorafast.accelerate(model, quiet=True)
    found = lorafast.explain(model)
    assert found.layers["base_model.model.linear"] is None
    assert "a Conv2d layer" in found.layers["base_model.model.conv"]
    assert type(model.base_model.model.conv) is stock_layers.Conv2d
    assert found.summary == (
        "1 of 2 adapter layers are fast, 1 PEFT's own (lorafast.explain(model) says why)"
    )


def test_dora_with_a_bias_of_B(served_by_peft):
    """Which PEFT refuses to make, but would compute."""

    def give_bias(layer):
        layer.lora_B["default"].bias = nn.Parameter(torch.ones(N))

    stock, fast = stock_and_fast(peft_model(use_dora=True), give_bias)
    assert "of DoRA with lora_bias" in str(lorafast.explain(fast))
    assert_same(stock, fast, torch.randn(5, K))
    assert len(served_by_peft) == 1
