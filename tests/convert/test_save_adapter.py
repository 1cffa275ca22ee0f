"""Adapters in files: what is saved, and what is refused."""

import warnings
from pathlib import Path

import pytest
import torch
from adapter_files import (
    CONFIG,
    DOWN_A,
    DOWN_B,
    UP_A,
    UP_B,
    WEIGHTS,
    good_config,
    good_tensors,
    lora_layers,
    read,
)
from safetensors.torch import load_file
from torch import nn

import lorafast


def test_writes_pefts_names_and_nothing_else(net, tmp_path, draw_adapters):
    draw_adapters(lorafast.adapt(net, 2, ["up", "down"], alpha=5, dropout=0.25))
    folder = tmp_path / "new" / "adapter"
    lorafast.save_adapter(net, folder)
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS}
    config, tensors = read(folder)
    up, down = net.block.up, net.block.down
    layers = {UP_A: up.lora_A, UP_B: up.lora_B, DOWN_A: down.lora_A, DOWN_B: down.lora_B}
    assert tensors.keys() == layers.keys()
    for key, parameter in layers.items():
        assert torch.equal(tensors[key], parameter), key
        assert tensors[key].dtype == parameter.dtype
    assert good_config().items() <= (config | {"target_modules": ["up", "down"]}).items()
    assert sorted(config["target_modules"]) == ["down", "up"]
    assert config["use_rslora"] is False


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([{}], id="all-linear"),
        pytest.param([{"targets": ["head"], "alpha": 0.5}], id="one-layer"),
        pytest.param([{"use_rslora": True, "alpha": 3}], id="rslora"),
        pytest.param([{"r": 1, "targets": ["up"]}, {"r": 3}], id="ranks"),
        pytest.param(
            [{"targets": ["up"], "alpha": 9}, {"targets": ["down"], "alpha": 0.1}, {"alpha": 7}],
            id="alphas",
        ),
        pytest.param([{"alpha": -3}], id="negative-alpha"),
        pytest.param([{"alpha": 0}], id="alpha-0"),
        pytest.param([{"adapter_dtype": torch.float32}], id="float32-adapters"),
    ],
)
def test_comes_back_as_it_was(make_net, x, tmp_path, assert_same, draw_adapters, options):
    net = make_net()
    for selection in options:
        lorafast.adapt(net, **{"r": 2} | selection)
    draw_adapters(net)
    lorafast.save_adapter(net, tmp_path)
    other = lorafast.load_adapter(make_net(), tmp_path)
    assert lora_layers(other) == lora_layers(net)
    assert_same(other(x).detach(), net(x).detach())
    for name in lora_layers(net):
        ours, theirs = net.get_submodule(name), other.get_submodule(name)
        assert (ours.r, ours.alpha, ours.use_rslora) == (theirs.r, theirs.alpha, theirs.use_rslora)


def _nested():
    """Names of which one is the ending of another, and one that isn't plain in a regex."""
    return nn.ModuleDict(
        {
            "fc": nn.Linear(3, 3),
            "f+c": nn.Linear(3, 3),
            "sub": nn.ModuleDict({"fc": nn.Linear(3, 3), "fcx": nn.Linear(3, 3)}),
            "norm": nn.LayerNorm(3),
        }
    )


@pytest.mark.parametrize("odd", ["fc", "f+c", "sub.fc", "sub.fcx"])
def test_a_layer_of_its_own_rank_and_alpha_does_not_spill_over(tmp_path, odd):
    model = lorafast.adapt(_nested(), 1, "|".join(map(_escaped, [odd])), alpha=5)
    lorafast.adapt(model, 2)
    lorafast.save_adapter(model, tmp_path)
    other = lorafast.load_adapter(_nested(), tmp_path)
    for name in lora_layers(model):
        layer = other.get_submodule(name)
        assert (layer.r, layer.alpha) == ((1, 5.0) if name == odd else (2, 2.0)), name


@pytest.mark.parametrize("name", ["fc", "f+c", "sub.fc", "sub.fcx"])
def test_the_config_targets_the_adapted_layers_and_no_others(tmp_path, name):
    model = lorafast.adapt(_nested(), 1, _escaped(name))
    lorafast.save_adapter(model, tmp_path)
    assert lora_layers(lorafast.load_adapter(_nested(), tmp_path)) == {name}


def _escaped(name):
    return name.replace("+", r"\+").replace(".", r"\.")


@pytest.mark.parametrize("targets", [["first"], ["second"], "all-linear"], ids=str)
def test_a_layer_reached_by_two_names_comes_back_as_it_was(
    tmp_path, assert_same, draw_adapters, targets
):
    def make():
        model = nn.Sequential()
        model.first = nn.Linear(3, 3, dtype=torch.float64)
        model.second = model.first
        torch.nn.init.eye_(model.first.weight)
        torch.nn.init.ones_(model.first.bias)
        return model

    model = draw_adapters(lorafast.adapt(make(), 2, targets))
    lorafast.save_adapter(model, tmp_path)
    other = lorafast.load_adapter(make(), tmp_path)
    assert other.first is other.second
    x = torch.randn(4, 3, dtype=torch.float64)
    assert_same(other(x).detach(), model(x).detach())


def test_layers_in_merged_state_are_saved_unmerged(net, make_net, tmp_path, draw_adapters):
    draw_adapters(lorafast.adapt(net, 2))
    lorafast.save_adapter(net, tmp_path / "unmerged")
    for layer in (net.block.up, net.block.down, net.head):
        layer.merge()
    lorafast.save_adapter(net, tmp_path / "merged")
    merged, unmerged = tmp_path / "merged", tmp_path / "unmerged"
    assert (merged / CONFIG).read_bytes() == (unmerged / CONFIG).read_bytes()
    # Not byte by byte: safetensors writes its metadata in any order.
    found, expected = load_file(merged / WEIGHTS), load_file(unmerged / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_replaces_the_adapter_that_is_in_the_folder(net, make_net, tmp_path):
    lorafast.save_adapter(lorafast.adapt(net, 3), tmp_path)
    lorafast.save_adapter(lorafast.adapt(make_net(), 1, ["up"]), tmp_path)
    other = lorafast.load_adapter(make_net(), tmp_path)
    assert {name: other.get_submodule(name).r for name in lora_layers(other)} == {"block.up": 1}


def test_adapters_that_share_memory_or_have_strides_are_saved(net, make_net, tmp_path):
    lorafast.adapt(net, 2, ["up", "down"])
    net.block.up.lora_A = nn.Parameter(torch.randn(5, 2, dtype=torch.float64).T)
    net.block.down.lora_B = nn.Parameter(net.block.up.lora_B.detach()[2:5])
    with torch.no_grad():
        net.block.up.lora_B.copy_(torch.arange(14).reshape(7, 2))
    lorafast.save_adapter(net, tmp_path)
    other = lorafast.load_adapter(make_net(), tmp_path)
    assert torch.equal(other.block.up.lora_A, net.block.up.lora_A)
    assert torch.equal(other.block.down.lora_B, net.block.up.lora_B[2:5])


def test_a_compiled_model_is_saved_and_loaded_by_its_own_names(net, make_net, tmp_path):
    lorafast.adapt(net, 2, ["up", "down"])
    lorafast.save_adapter(torch.compile(net), tmp_path)
    assert read(tmp_path)[1].keys() == good_tensors().keys()
    other = make_net()
    compiled = torch.compile(other)
    assert lorafast.load_adapter(compiled, tmp_path) is compiled
    assert torch.equal(other.block.up.lora_A, net.block.up.lora_A)


def test_a_data_parallel_model_is_saved_by_its_own_names(net, tmp_path):
    lorafast.adapt(net, 2, ["up", "down"])
    lorafast.save_adapter(nn.DataParallel(net), tmp_path)
    assert read(tmp_path)[1].keys() == good_tensors().keys()


def test_names_the_base_model(net, tmp_path):
    net.name_or_path = Path("some") / "model"
    lorafast.save_adapter(lorafast.adapt(net, 2), tmp_path)
    assert read(tmp_path)[0]["base_model_name_or_path"] == str(Path("some") / "model")


@pytest.mark.parametrize("names", [["head"], ["head", "norm"], ("norm",)], ids=str)
def test_stores_other_modules_whole(net, make_net, tmp_path, names):
    lorafast.adapt(net, 2, ["up", "down"])
    with torch.no_grad():
        for name in names:
            net.get_submodule(name).weight.normal_()
            net.get_submodule(name).bias.normal_()
            net.get_submodule(name).requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lorafast.save_adapter(net, tmp_path, modules_to_save=names)
    assert read(tmp_path)[0]["modules_to_save"] == sorted(names)
    other = lorafast.load_adapter(make_net(), tmp_path)
    for key, tensor in net.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor), key


def test_warns_of_what_is_trained_and_not_saved(net, tmp_path):
    lorafast.adapt(net, 2, ["up"])
    net.head.requires_grad_(True)
    net.norm.bias.requires_grad_(True)
    with pytest.warns(
        UserWarning, match=r"modules_to_save\): norm\.bias, head\.weight, head\.bias"
    ):
        lorafast.save_adapter(net, tmp_path)
    with pytest.warns(UserWarning, match=r"modules_to_save\): norm\.bias$"):
        lorafast.save_adapter(net, tmp_path, modules_to_save=["head"])


def _tied():
    model = nn.ModuleDict(
        {"embed": nn.Embedding(7, 5), "fc": nn.Linear(5, 5), "head": nn.Linear(5, 7)}
    )
    model["head"].weight = model["embed"].weight
    return model


@pytest.mark.parametrize("stored", ["head", "embed"])
def test_refuses_to_store_a_weight_without_the_module_that_shares_it(tmp_path, stored):
    # PEFT reads the stored module as a copy of its own: there the other keeps its old weight.
    model = lorafast.adapt(_tied(), 2, ["fc"])
    with pytest.raises(ValueError, match=rf"{stored}\.weight is shared with .*\.weight"):
        lorafast.save_adapter(model, tmp_path / "new", modules_to_save=[stored])
    assert not (tmp_path / "new").exists()


def test_stores_both_modules_that_share_a_weight(tmp_path):
    model = lorafast.adapt(_tied(), 2, ["fc"])
    lorafast.save_adapter(model, tmp_path, modules_to_save=["head", "embed"])
    other = lorafast.load_adapter(_tied(), tmp_path)
    assert other["head"].weight is other["embed"].weight
    assert torch.equal(other["head"].weight, model["head"].weight)


@pytest.mark.parametrize(
    ("names", "error", "sentence"),
    [
        pytest.param(["haed"], ValueError, "modules_to_save has 'haed'", id="misspelt"),
        pytest.param("head", TypeError, "modules_to_save is the string 'head'", id="string"),
        pytest.param(["up"], ValueError, r"block\.up", id="an-adapted-layer"),
        pytest.param(["block"], ValueError, r"block", id="around-an-adapted-layer"),
    ],
)
def test_refuses_modules_to_save_and_writes_nothing(net, tmp_path, names, error, sentence):
    lorafast.adapt(net, 2, ["up"])
    with pytest.raises(error, match=sentence):
        lorafast.save_adapter(net, tmp_path / "new", modules_to_save=names)
    assert not (tmp_path / "new").exists()


def _mixed_dropout(net):
    lorafast.adapt(net, 2, ["up"], dropout=0.5)
    return lorafast.adapt(net, 2)


def _mixed_rslora(net):
    lorafast.adapt(net, 2, ["up"], use_rslora=True)
    return lorafast.adapt(net, 2)


def _compiled_inside(net):
    lorafast.adapt(net, 2)
    net.block = torch.compile(net.block)
    return net


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        pytest.param(lambda net: net, "no adapted layer: there is no adapter", id="none"),
        pytest.param(
            lambda net: lorafast.adapt(net.head, 2), "the model is itself a LoRALinear", id="root"
        ),
        pytest.param(_mixed_dropout, r"dropout is 0\.5 in block\.up.*0\.0 in", id="dropouts"),
        pytest.param(_mixed_rslora, r"use_rslora is True in block\.up", id="rslora-and-not"),
        pytest.param(_compiled_inside, "a module inside the model is compiled", id="compiled"),
    ],
)
def test_refuses_to_save_what_the_format_cannot_hold(net, tmp_path, make, sentence):
    model = make(net)
    with pytest.raises(ValueError, match=sentence):
        lorafast.save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_warns_that_peft_adapts_a_layer_of_two_names_under_one(net, tmp_path):
    net.again = net.block.up
    lorafast.adapt(net, 2, ["up"])
    with pytest.warns(UserWarning, match=r"are one layer, which PEFT adapts under the first name"):
        lorafast.save_adapter(net, tmp_path)
