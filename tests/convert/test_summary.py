import pytest
import torch
from torch import nn

import lorafast
from lorafast.convert import AdapterRow, LeftOut

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
    header, up, wide, total, *_ = str(lorafast.summary(net)).splitlines()
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


def test_names_the_frozen_layers_without_an_adapter(net):
    net.table = nn.Embedding(11, 3)
    net.again = nn.Linear(3, 11, bias=False)
    net.again.weight = net.table.weight
    net.trained = nn.Conv2d(2, 3, 3)
    lorafast.adapt(net, 2, ["up"])
    net.trained.requires_grad_(True)
    summary = lorafast.summary(net)
    assert summary.left == (
        LeftOut("Embedding", 1, 33, by_name=True),
        LeftOut("Linear", 2, 7 * 3 + (3 * 2 + 2)),
    )
    assert str(summary).splitlines()[-2:] == [
        "without adapter: 1 Embedding, 33 parameters (adapted where targets name them)",
        "without adapter: 2 Linear, 29 parameters",
    ]


class Experts(nn.Module):
    """Four experts in one parameter, as Transformers' mixtures keep them."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(3, 4)
        self.up = nn.Parameter(torch.zeros(4, 3, 5))


def test_adapt_says_when_most_parameters_are_in_stacked_experts():
    model = Experts()
    by_parameter = r"1 Experts, 60 parameters \(PEFT adapts them: LoraConfig\(target_parameters"
    with pytest.warns(UserWarning, match=f"79 % of the parameters.*{by_parameter}"):
        lorafast.adapt(model, 4)
    assert lorafast.summary(model).left == (
        LeftOut("Experts", 1, 60, "LoraConfig(target_parameters=[...])"),
    )


def test_adapt_says_when_most_parameters_are_in_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 3), nn.Linear(8, 2))
    sentence = (
        r"1 Conv2d, 224 parameters \(adapted where targets name.*1 ConvTranspose2d, 584 parameters$"
    )
    with pytest.warns(UserWarning, match=sentence):
        lorafast.adapt(model, 2)


def test_adapt_is_silent_of_few_convolutions_and_of_layers_that_were_not_asked_for(recwarn):
    patches = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Embedding(99, 32), nn.Linear(32, 64))
    lorafast.adapt(patches, 2)
    lorafast.adapt(nn.Sequential(nn.Conv2d(9, 9, 3), nn.Linear(2, 2)), 2, ["1"])
    assert not recwarn.list


@pytest.mark.parametrize(
    ("r", "options", "spoken"),
    [(16, {}, True), (8, {}, False), (16, {"alpha": 8}, False)],
    ids=["default", "as-peft", "alpha"],
)
def test_says_where_the_default_scaling_is_not_peft_s(net, r, options, spoken):
    text = str(lorafast.summary(lorafast.adapt(net, r, **options)))
    assert ("that of PEFT's LoraConfig is 8 / r" in text) == spoken


def test_peft_s_default_scaling_is_8_over_r(net):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(net, peft.LoraConfig(r=16, target_modules=["up"]))
    assert model.base_model.model.block.up.scaling["default"] == 8 / 16
