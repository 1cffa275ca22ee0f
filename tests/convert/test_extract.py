"""``extract``: the nearest adapter of rank r to a difference, and what it loses."""

import copy
import json
import math

import pytest
import torch
from torch import nn

import lorafast
from lorafast.convert.extract import ITERATIONS, OVERSAMPLED

safetensors = pytest.importorskip("safetensors.torch")


EPS = torch.finfo(torch.float64).eps
LOST = 35 * EPS
"""What rounding leaves: one for each element of the largest layer."""


def finetuned(net, draw_adapters, **options):
    """``net`` with ``W + scaling · B·A`` in its linear layers."""
    return lorafast.merge(draw_adapters(lorafast.adapt(copy.deepcopy(net), **options)))


@pytest.mark.parametrize("kind", ["models", "files", "state dicts"])
def test_an_adapter_comes_back(net, x, kind, tmp_path, draw_adapters, assert_same, capsys):
    full = finetuned(net, draw_adapters, r=2, alpha=3)
    given, options = (full, net), {}
    if kind == "state dicts":
        given, options = (full.state_dict(), net.state_dict()), {"targets": ["up", "down", "head"]}
    elif kind == "files":
        shards = {"a.safetensors": ["block.up.weight"]}
        rest = [key for key in net.state_dict() if key not in shards["a.safetensors"]]
        for folder, model in (("full", full), ("base", net)):
            (tmp_path / folder).mkdir()
            for shard, keys in (shards | {"b.safetensors": rest}).items():
                state = {key: model.state_dict()[key] for key in keys}
                safetensors.save_file(state, tmp_path / folder / shard)
        index = {
            "weight_map": dict.fromkeys(rest, "b.safetensors")
            | {"block.up.weight": "a.safetensors"}
        }
        for folder in ("full", "base"):
            (tmp_path / folder / "model.safetensors.index.json").write_text(json.dumps(index))
        given, options = (tmp_path / "full", tmp_path / "base"), {"targets": r"block\..*|head"}
    found = lorafast.extract(*given, 2, folder=tmp_path / "adapter", **options)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == [*found.lost, "3"]
    assert max(found.lost.values()) <= LOST
    assert "3 layers, lost in all" in str(found)
    for source in (found.adapter, tmp_path / "adapter"):
        model = lorafast.load_adapter(copy.deepcopy(net), source)
        assert_same(model(x), full(x))


@pytest.mark.parametrize("svd", ["exact", "randomised"])
def test_the_loss_is_eckart_and_youngs(svd):
    torch.manual_seed(3)
    N, K, r = 40, 30, 5
    base = nn.Sequential(nn.Linear(K, N, bias=False)).double()
    full = copy.deepcopy(base)
    delta = torch.randn(N, K, dtype=torch.float64)
    full[0].weight.data += delta
    found = lorafast.extract(full, base, r, svd=svd, report=None)
    sigma = torch.linalg.svdvals(full[0].weight - base[0].weight).detach()
    least = (sigma[r:].square().sum() / sigma.square().sum()).sqrt().item()
    layer = lorafast.load_adapter(copy.deepcopy(base), found.adapter)[0]
    residual = delta - layer.delta_weight()
    rounding = N * K * EPS  # of a sum of so many squares
    assert found.lost["0"] == pytest.approx((residual.norm() / delta.norm()).item(), rel=rounding)
    assert found.total == pytest.approx(found.lost["0"], rel=4 * EPS)
    if svd == "exact":
        assert found.lost["0"] == pytest.approx(least, rel=rounding)
    else:  # Halko, Martinsson and Tropp (2011), corollary 10.10 as their introduction states it
        columns = r + OVERSAMPLED
        bound = (1 + 4 * math.sqrt(2 * min(N, K) / (columns - 1))) ** (1 / (2 * ITERATIONS + 1))
        assert least * (1 - rounding) <= found.lost["0"]
        assert torch.linalg.matrix_norm(residual, 2) <= bound * sigma[r]


def test_every_kind_of_layer(assert_same):
    """A convolution, an embedding, a ``Conv1D``; r beyond a layer's size; a layer that is as it was."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(4)
    net = nn.ModuleDict(
        {
            "tokens": nn.Embedding(7, 3),
            "conv": nn.Conv2d(2, 5, 3),
            "turned": conv1d(6, 4),
            "same": nn.Linear(4, 4),
        }
    ).double()
    full = copy.deepcopy(net)
    for name in ("tokens", "conv", "turned"):
        full[name].weight.data.add_(torch.randn(full[name].weight.shape))
    found = lorafast.extract(full, net, 5, targets=[*net], report=None)
    assert {name: layer.r for name, layer in layers_of(found, net).items()} == {
        "tokens": 3, "conv": 5, "turned": 4,
    }  # fmt: skip
    for name, layer in layers_of(found, net).items():
        assert_same(layer.to_plain().weight.detach(), full[name].weight.detach())
    grouped = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))
    with pytest.raises(ValueError, match="0 is a Conv2d, whose difference is not one matrix"):
        lorafast.extract(copy.deepcopy(grouped), grouped, 1, targets=["0"])


def test_tied_weights(assert_same):
    """Each module that has the weight needs an adapter; a file holds the weight once."""
    net = nn.ModuleDict({"tokens": nn.Embedding(7, 3), "head": nn.Linear(3, 7)}).double()
    net["head"].weight = net["tokens"].weight
    full = copy.deepcopy(net)
    full["tokens"].weight.data.add_(1)
    once = {key: value for key, value in full.state_dict().items() if key != "head.weight"}
    for given in (full, once):
        found = lorafast.extract(given, net, 1, targets=["tokens", "head"], report=None)
        for name, layer in layers_of(found, net).items():
            assert_same(layer.to_plain().weight.detach(), full[name].weight.detach())
        assert found.lost.keys() == {"tokens", "head"}
        with pytest.raises(ValueError, match=r"get no adapter: head\.weight"):
            lorafast.extract(given, net, 1, targets=["tokens"], report=None)
        with pytest.raises(ValueError, match=r"head\.weight .* is the weight of tokens too"):
            lorafast.extract(given, net, 1, targets=["tokens"], others="save", report=None)
    both = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}).double()
    both["again"] = both["a"]  # one module, whose adapter is at both its names
    full = copy.deepcopy(both)
    full["a"].weight.data.add_(1)
    model = lorafast.load_adapter(
        copy.deepcopy(both), lorafast.extract(full, both, 1, targets=["a"], report=None).adapter
    )
    x = torch.randn(2, 3, dtype=torch.float64)
    for name in full:
        assert_same(model[name](x), full[name](x))


def layers_of(found, net):
    model = lorafast.load_adapter(copy.deepcopy(net), found.adapter)
    return {n: m for n, m in model.named_modules() if isinstance(m, lorafast.nn.AdapterLayer)}


def test_bfloat16_differences_are_exact(net, draw_adapters):
    """They are taken in float32, not in bfloat16."""
    base = net.bfloat16()
    full = finetuned(base, draw_adapters, r=1)
    found = lorafast.extract(full, base, 7, report=None)
    for name, layer in layers_of(found, base).items():
        difference = (
            full.get_submodule(name).weight.float() - base.get_submodule(name).weight.float()
        )
        error = (layer.delta_weight() - difference).norm() / difference.norm()
        assert error <= 64 * torch.finfo(torch.float32).eps


def test_autocast_changes_nothing(net, draw_adapters):
    net = net.float()
    full = finetuned(net, draw_adapters, r=2)
    expected = lorafast.extract(full, net, 2, report=None)
    with torch.autocast("cpu", torch.bfloat16):
        found = lorafast.extract(full, net, 2, report=None)
    assert found.lost == expected.lost
    for key, tensor in found.adapter.tensors.items():
        assert torch.equal(tensor, expected.adapter.tensors[key]), key


def test_what_else_differs(net, x, draw_adapters, assert_same, unchanged):
    full = finetuned(net, draw_adapters, r=2, targets=["up", "down"])
    full.norm.weight.data += 1
    with (
        unchanged(net),
        pytest.raises(ValueError, match=r"these differ and get no adapter: norm\.weight"),
    ):
        lorafast.extract(full, net, 2, report=None)
    kept = lorafast.extract(full, net, 2, others="save", report=None)
    assert kept.adapter.config["modules_to_save"] == ["norm"]
    stored = kept.adapter.tensors["base_model.model.norm.weight"]
    assert stored.data_ptr() != full.norm.weight.data_ptr()
    assert_same(lorafast.load_adapter(copy.deepcopy(net), kept.adapter)(x), full(x))
    left = lorafast.extract(full, net, 2, others="drop", report=None)
    assert left.dropped == ("norm.weight",)
    assert "dropped, though they differ: norm.weight" in str(left)
    assert set(left.lost) == {"block.up", "block.down"}
    full.block.up.bias.data += 1
    with pytest.raises(
        ValueError, match=r"block\.up\.bias differs, and block\.up can't be stored whole"
    ):
        lorafast.extract(full, net, 2, others="save", report=None)
    whole = lorafast.extract(full, net, 2, exclude=["up"], others="save", report=None)
    assert_same(lorafast.load_adapter(copy.deepcopy(net), whole.adapter)(x), full(x))


def test_bad_input(net, make_net, tmp_path, draw_adapters):
    full = finetuned(net, draw_adapters, r=2)
    cases = [
        ((full, net, 0), {}, "r is 0"),
        ((full, net, 2), {"others": "keep"}, "others is 'keep', expected 'refuse' or 'save' or 'drop'"),
        ((full, net, 2), {"svd": "fast"}, "svd is 'fast'"),
        ((net, make_net(), 2), {}, "are equal in all layers"),
        ((full.state_dict(), net.state_dict(), 2), {}, "neither full_finetuned nor base is a model"),
        ((full.state_dict(), net.state_dict(), 2), {"targets": ["q"]}, "which names no weight"),
        ((full.state_dict(), net.state_dict(), 2), {"targets": ["norm"]}, "expected that of a linear"),
        ((full.block, net, 2), {}, r"base has block\.up\.weight, and full_finetuned has not"),
        ((full.state_dict() | {"head.bias": torch.zeros(3)}, net, 2), {}, r"head\.bias has shape \[3\]"),
        ((full.state_dict() | {"head.weight": torch.full((2, 3), torch.nan)}, net, 2), {}, "is NaN"),
        ((full, copy.deepcopy(net).to("meta"), 2), {}, "is on the device meta"),
    ]  # fmt: skip
    for given, options, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            lorafast.extract(*given, report=None, **options)
    with pytest.raises(FileNotFoundError, match="it holds nothing"):
        lorafast.extract(tmp_path, net, 2)
    with pytest.raises(TypeError, match="base is a int"):
        lorafast.extract(net, 3, 2)
    (tmp_path / "model.safetensors").write_text("no")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        lorafast.extract(tmp_path, net, 2)
