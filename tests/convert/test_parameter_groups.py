"""``parameters``: every trained parameter in one group, with LoRA+'s rates and no decay of vectors."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import lorafast


class OwnNorm2d(nn.Module):
    """A norm of somebody's own, whose weight has two dimensions."""

    def __init__(self):
        super().__init__()
        self.weight, self.shift = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.up = nn.Linear(4, 6)
        self.norm = OwnNorm2d()
        self.layer_norm = nn.LayerNorm((3, 2))
        self.conv = nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.table.weight


def by_name(model, groups):
    """The names of the parameters of each group."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {group["name"]: [names[id(p)] for p in group["params"]] for group in groups}


def test_each_trained_parameter_is_in_one_group():
    model = Model()
    model.up.bias.requires_grad_(False)
    groups = lorafast.parameters(model)
    assert by_name(model, groups) == {
        "matrices": ["table.weight", "up.weight", "conv.weight"],
        "vectors": [
            "norm.weight",
            "norm.shift",
            "layer_norm.weight",
            "layer_norm.bias",
            "conv.bias",
            "head.bias",
        ],
    }
    assert [group.keys() - {"params", "name"} for group in groups] == [set(), {"weight_decay"}]


def test_adapters_have_lora_plus_rates():
    model = lorafast.adapt(Model(), 2, ["table", "up", "conv"], use_dora=True)
    model.head.bias.requires_grad_(True)
    groups = lorafast.parameters(model, lr=1e-3, ratio=16, weight_decay=0.1)
    assert by_name(model, groups) == {
        "matrices": ["table.lora_embedding_A", "up.lora_A", "conv.lora_A"],
        "lora_B": ["table.lora_embedding_B", "up.lora_B", "conv.lora_B"],
        # That of the convolution has four dimensions.
        "vectors": [
            "table.lora_magnitude",
            "up.lora_magnitude",
            "conv.lora_magnitude",
            "head.bias",
        ],
    }
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates == {"matrices": (1e-3, 0.1), "lora_B": (16e-3, 0.1), "vectors": (1e-3, 0.0)}


def test_a_step_moves_each_group_at_its_rate():
    model = lorafast.adapt(nn.Sequential(nn.MultiheadAttention(4, 2)), 2, ["0"])
    groups = lorafast.parameters(model, lr=0.5, ratio=4.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(groups)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    moved = {
        n: (before[n] - p).mean().item() for n, p in model.named_parameters() if p.requires_grad
    }
    assert moved == pytest.approx(
        {"0.lora_A": 0.5, "0.lora_B": 2.0, "0.out_lora_A": 0.5, "0.out_lora_B": 2.0}
    )


def test_of_bottlenecks_and_of_adapters_that_wait():
    model = lorafast.adapt(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 2, ["1"])
    lorafast.adapt(model, kind="houlsby", targets=["0"], bottleneck=2, layer_norm=True)
    lorafast.add_adapter(model, "b", 2)
    one = "0.bottleneck."
    assert by_name(model, lorafast.parameters(model, lr=1.0, ratio=2)) == {
        "matrices": [f"{one}down", f"{one}up", "1.lora_A"],
        "lora_B": ["1.lora_B"],
        "vectors": [
            f"{one}{name}" for name in ("down_bias", "up_bias", "norm.weight", "norm.bias")
        ],
    }


@pytest.mark.slow
def test_has_the_rates_of_pefts_lora_plus(net):
    peft = pytest.importorskip("peft")
    optimizers = pytest.importorskip("peft.optimizers")
    config = peft.LoraConfig(r=2, target_modules=["up", "down"])
    model = peft.PeftModel(net, config)
    theirs = optimizers.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    ours = torch.optim.AdamW(lorafast.parameters(model, lr=1e-3, ratio=16, weight_decay=0.1))

    def rates(optimizer):
        return {
            id(p): (group["lr"], group["weight_decay"])
            for group in optimizer.param_groups
            for p in group["params"]
        }

    assert rates(ours) == rates(theirs)
    assert len(rates(ours)) == 4


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ratio": 2.0}, "ratio is 2.0 and lr is None"),
        ({"lr": 1.0, "ratio": 0.0}, "ratio is 0.0, expected a positive"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": "x"}, "lr is 'x', expected a finite number"),
        ({"lr": torch.ones(2)}, r"lr is tensor\(.*, expected a finite number"),
        ({"lr": 1.0, "ratio": None}, "ratio is None, expected a positive finite number"),
        ({"lr": 1.0, "weight_decay": float("nan")}, "weight_decay is nan"),
    ],
)
def test_refuses_in_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        lorafast.parameters(nn.Linear(2, 2), **options)


def test_refuses_where_there_is_nothing_to_train():
    with pytest.raises(ValueError, match="there is nothing to train"):
        lorafast.parameters(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="weight has no shape yet"):
        lorafast.parameters(nn.LazyLinear(2))
    with pytest.raises(ValueError, match="no factor B of an adapter is trained"):
        lorafast.parameters(nn.Linear(2, 2), 1.0, ratio=2)


def test_refuses_flat_parameters():
    class Flat(FullyShardedDataParallel):
        def __init__(self):
            nn.Module.__init__(self)
            self._parameters["weight"] = nn.Parameter(torch.ones(4))

    with pytest.raises(ValueError, match="is in FullyShardedDataParallel"):
        lorafast.parameters(nn.Sequential(Flat()))
