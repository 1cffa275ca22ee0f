import pytest
import torch
from torch import nn

import lorafast
from lorafast.convert import AdapterRow

# Net: up 5 → 7 with bias, down 7 → 3 without, a norm over 3, head 3 → 2 with bias.
BASE = (5 * 7 + 7) + 7 * 3 + (3 + 3) + (3 * 2 + 2)


def test_counts_and_rows(net):
    lorafast.adapt(net, 2, ["up"], alpha=3, dropout=0.25)
    lorafast.adapt(net, 4, ["head"], use_rslora=True)
    net.head.merge()
    summary = lorafast.summary(net)
    up, head = 2 * (5 + 7), 4 * (3 + 2)
    assert summary.total == BASE + up + head
    assert summary.trainable == summary.adapter == up + head
    assert summary.layers == (
        AdapterRow("block.up", 5, 7, 2, 1.5, 0.25, up, merged=False),
        AdapterRow("head", 3, 2, 4, 2.0, 0.0, head, merged=True),
    )


def test_trained_parameters_outside_adapters_count_as_trained(net):
    lorafast.adapt(net, 1, ["up"], freeze=False)
    summary = lorafast.summary(net)
    assert summary.adapter == 5 + 7
    assert summary.trainable == BASE + 5 + 7 - (5 * 7 + 7)


def test_a_model_without_adapters(net):
    summary = lorafast.summary(net)
    assert (summary.total, summary.trainable, summary.adapter) == (BASE, BASE, 0)
    assert summary.layers == ()
    assert f"{BASE} of {BASE} parameters are trained (100.00 %)" in str(summary)


def test_a_model_without_parameters():
    summary = lorafast.summary(nn.ReLU())
    assert (summary.total, summary.trainable, summary.adapter) == (0, 0, 0)
    assert "0 of 0 parameters are trained (0.00 %)" in str(summary)


def test_shared_parameters_count_once():
    model = nn.Module()
    model.embed = nn.Embedding(7, 5)
    model.head = nn.Linear(5, 7, bias=False)
    model.head.weight = model.embed.weight
    model.alias = model.head
    lorafast.adapt(model, 3)
    summary = lorafast.summary(model)
    assert summary.total == 7 * 5 + 3 * (5 + 7)
    assert summary.trainable == summary.adapter == 3 * (5 + 7)
    assert [row.name for row in summary.layers] == ["head"]


def test_a_shared_half_of_an_adapter_counts_once():
    model = lorafast.adapt(nn.Sequential(nn.Linear(5, 3), nn.Linear(5, 2)), 2)
    model[1].lora_A = model[0].lora_A
    summary = lorafast.summary(model)
    assert summary.trainable == 2 * 5 + 3 * 2 + 2 * 2
    assert summary.adapter == summary.trainable


def test_a_model_that_is_a_lora_layer_is_called_the_model():
    layer = lorafast.adapt(nn.Linear(5, 3), 2)
    (row,) = lorafast.summary(layer).layers
    assert row.name == "(model)"


def test_prints_one_line_per_layer_and_a_total(net):
    net.wide = nn.Linear(1000, 300, bias=False, device="meta", dtype=torch.float64)
    lorafast.adapt(net, 4, ["up", "wide"], alpha=3, dropout=0.25)
    net.block.up.merge()
    header, up, wide, total = str(lorafast.summary(net)).splitlines()
    assert header.split() == ["layer", "in", "→", "out", "r", "scaling", "dropout", "parameters"]
    assert up.split() == ["block.up", "5", "→", "7", "4", "0.75", "0.25", "48", "merged"]
    assert wide.split() == ["wide", "1000", "→", "300", "4", "0.75", "0.25", "5,200"]
    assert header.index("parameters") + len("parameters") == len(wide)
    trained = 48 + 5_200
    everything = BASE + 300_000 + trained
    assert total == (
        f"2 adapted layers, 5,248 adapter parameters; 5,248 of {everything:,} parameters are "
        f"trained ({100 * trained / everything:.2f} %)"
    )


@pytest.mark.parametrize(("layers", "words"), [(1, "1 adapted layer,"), (2, "2 adapted layers,")])
def test_speaks_of_one_layer_in_the_singular(net, layers, words):
    lorafast.adapt(net, 2, ["up", "down"][:layers])
    assert words in str(lorafast.summary(net))


def test_shows_itself_in_a_session(net):
    summary = lorafast.summary(lorafast.adapt(net, 2))
    assert repr(summary) == str(summary)
