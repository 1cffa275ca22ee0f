"""Layers that are called twice in a forward, tied weights, shared adapters: the gradients add up."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lorafast.nn import LoRAConv, LoRAConv2d, LoRALinear, siblings
from lorafast.ops import siblings as shared_op


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    monkeypatch.setattr(shared_op, "FEWEST_ROWS", 1)
    monkeypatch.setattr(shared_op, "FEWEST_ELEMENTS", 1)


class Net(nn.Module):
    """Each layer has two inputs, of which one is the other's too."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = make(), make()
        for name, p in self.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p)

    def forward(self, x, call=lambda layer, x: layer(x)):
        y = torch.tanh(call(self.first, x))
        z = call(self.second, y) + call(self.second, x) ** 2
        return call(self.first, torch.tanh(z)) + z


def plain(layer, x):
    """What is right, in PyTorch's own calls."""
    if isinstance(layer, LoRAConv):
        y = F.conv2d(x, layer.weight, layer.bias, padding=layer.padding)
        s = F.conv2d(x, layer.lora_A, padding=layer.padding)
        return y + layer.scaling * F.conv2d(s, layer.lora_B)
    y = F.linear(x, layer.weight, layer.bias)
    return y + layer.scaling * F.linear(F.linear(x, layer.lora_A), layer.lora_B)


def tie_weight(net):
    net.second.weight = net.first.weight


def tie_layer(net):
    net.second = net.first


def share_lora_A(net):
    net.second.lora_A = net.first.lora_A


def share_adapter(net):
    share_lora_A(net)
    net.second.lora_B = net.first.lora_B


KINDS = {
    "linear": (lambda: LoRALinear(6, 6, 3, dtype=torch.float64), (4, 5, 6)),
    "siblings": (lambda: LoRALinear(6, 6, 3, dtype=torch.float64), (4, 5, 6)),
    "conv": (lambda: LoRAConv2d(6, 6, 3, 3, padding=1, dtype=torch.float64), (2, 6, 4, 5)),
    "1 x 1": (lambda: LoRAConv2d(6, 6, 1, 3, dtype=torch.float64), (2, 6, 4, 5)),
}
TIES = {
    "twice": lambda net: None,
    "tied weight": tie_weight,
    "tied layer": tie_layer,
    "shared lora_A": share_lora_A,
    "shared adapter": share_adapter,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tie", TIES)
def test_gradients_add_up(kind, tie):
    make, size = KINDS[kind]
    net = Net(make)
    if kind == "siblings":
        siblings.tie([net.first, net.second])
    TIES[tie](net)
    x = torch.randn(size, dtype=torch.float64)
    if kind == "1 x 1":
        x = x.contiguous(memory_format=torch.channels_last)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    found = []
    for options in ({}, {"call": plain}):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = net(leaf, **options)
        gradients = torch.autograd.grad(y.square().sum(), [leaf, *trained.values()])
        found.append(dict(zip(["y", "x", *trained], [y, *gradients], strict=True)))
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, msg=f"d{name}")
    once = {"tied layer", "shared adapter"}
    assert len(trained) == (2 if tie in once else 3 if tie == "shared lora_A" else 4)
