"""Variants of LoRA that are left to PEFT, by which rule; and compiled code."""

import copy

import pytest
import torch

pytest.importorskip("peft")

from peft.tuners.lora.variants import BdLoraLinearVariant
from peft_twins import K, OwnTensor, assert_same, config, hooked, layer_of, peft_model
from test_variants import made, options_of, with_another
from torch import nn

import lorafast


class Own(BdLoraLinearVariant):
    """Not exactly BD-LoRA."""


CHANGES = {
    "KaSA": (
        lambda layer: layer._lora_kasa_truncation_deferred.add("default"),
        "of KaSA, has yet to truncate the weight",
    ),
    "KaSA, of another shape": (
        lambda layer: layer.lora_diag.update({"default": nn.Parameter(torch.full((1,), 0.7))}),
        "of KaSA, has a diagonal of the shape [1]",
    ),
    "MonteCLoRA": (
        lambda layer: layer.lora_monteclora_sampler.pop("default"),
        "of MonteCLoRA, has yet to make its sampler",
    ),
    "BD-LoRA, A": (lambda layer: hooked(layer.lora_A["default"]), "has hooks"),
    "BD-LoRA, B": (
        lambda layer: layer.lora_variant.update(default=Own()), "is of another kind: Own"
    ),
    "VeLoRA": (
        lambda layer: layer.lora_velora_embed.update(
            {"default": layer.lora_velora_embed["default"].as_subclass(OwnTensor)}
        ),
        "of VeLoRA, has a OwnTensor for its vector",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_what_is_changed_about_a_layer(kind, served_by_peft):
    do, reason = CHANGES[kind]
    stock = made(kind.partition(", of")[0])
    fast = lorafast.accelerate(copy.deepcopy(stock), quiet=True)
    for model in (stock, fast):
        do(layer_of(model))
    (why,) = lorafast.explain(fast).layers.values()
    assert reason in why
    x = torch.randn(5, K)
    assert_same(stock, fast, x)
    assert len(served_by_peft) == 1
    if "has yet to" in reason:  # it has, now
        assert set(lorafast.explain(fast).layers.values()) == {None}
        torch.testing.assert_close(fast.eval()(x), stock.eval()(x))
        assert len(served_by_peft) == 1


@pytest.mark.parametrize("first", ["DoRA", "VeLoRA"])
@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
def test_what_is_active_together_with_alora(first, served_by_peft):
    stock = with_another(first, "aLoRA")
    fast = lorafast.accelerate(copy.deepcopy(stock), quiet=True)
    (why,) = lorafast.explain(fast).layers.values()
    assert why == f"adapter 'default', of {first}, is active together with aLoRA's 'other'"
    assert_same(stock, fast, torch.randn(3, 5, K), alora_offsets=[1, None, 5])
    assert len(served_by_peft) == 1


@pytest.mark.parametrize("kind", ["MonteCLoRA", "VeLoRA"])
def test_a_mixed_batch_in_training(kind, served_by_peft):
    stock = peft_model()
    stock.add_adapter("other", config(**options_of(kind)))
    layers = layer_of(stock), layer_of(lorafast.accelerate(copy.deepcopy(stock), quiet=True))
    assert_same(*layers, torch.randn(3, K), adapter_names=["default", "other", "other"])
    assert len(served_by_peft) == 1


def test_blocks_that_do_not_fit(served_by_peft):
    stock = made("BD-LoRA, A")
    fast = lorafast.accelerate(copy.deepcopy(stock), quiet=True)
    messages = []
    for model in (stock, fast):
        layer_of(model).lora_A["default"].nblocks = 3
        with pytest.raises(RuntimeError) as raised:
            model(torch.randn(5, K))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert "has 3 blocks in a weight of the shape [4, 12]" in str(lorafast.explain(fast))
    assert len(served_by_peft) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["KaSA", "BD-LoRA, A"])
def test_compiled(kind, served_by_peft):
    stock = made(kind)
    fast = lorafast.accelerate(copy.deepcopy(stock), quiet=True)
    compiled = torch.compile(layer_of(fast), backend="aot_eager", fullgraph=True)
    found, x = [], torch.randn(7, K)
    for model in (layer_of(stock), compiled):
        y = model(x)
        y.sum().backward()
        found.append([y] + [p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[1]) > 1
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert served_by_peft == []


@pytest.mark.parametrize("kind", ["MonteCLoRA", "VeLoRA"])
def test_compiled_training_is_left_to_PEFT(kind, monkeypatch):
    """Asked without a compiler, which takes long over PEFT's own."""
    fast = lorafast.accelerate(made(kind), quiet=True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert f"adapter 'default', of {kind}, " in str(lorafast.explain(fast))
    assert set(lorafast.explain(fast.eval()).layers.values()) == {None}
