"""FSDP2 and DTensors in one process: what is merged, and what says why it is not."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import lorafast
from lorafast.nn import LoRALinear


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def adapted():
    model = lorafast.adapt(nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 6)), 2)
    for layer in model:
        nn.init.normal_(layer.lora_B)
    return model


@pytest.mark.parametrize(
    ("shard", "name"),
    [(lambda model: model, "the model"), (lambda model: model[1], "1")],
    ids=["model", "layer"],
)
def test_a_sharded_model_is_refused_and_goes_on(mesh, shard, name):
    model, x = adapted(), torch.randn(3, 7)
    expected = copy.deepcopy(model)(x)
    fully_shard(shard(model), mesh=mesh)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^{name} is sharded by FSDP.*merge before sharding"):
            lorafast.merge(model)
        torch.testing.assert_close(model(x), expected)


def test_one_layer_of_a_sharded_model_is_merged(mesh):
    model, x = adapted(), torch.randn(3, 7, requires_grad=True)
    whole = copy.deepcopy(model)
    fully_shard(model, mesh=mesh)
    plain = model[0].to_linear()
    torch.testing.assert_close(plain.weight.full_tensor(), whole[0].to_linear().weight)
    model[0].merge()
    for _ in range(2):
        for net in (model, whole):
            net.zero_grad()
        y, expected = model(x), whole(x)
        torch.testing.assert_close(y, expected)
        found = torch.autograd.grad(y.sum(), x)[0]
        torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), x)[0])
    model[0].unmerge()
    torch.testing.assert_close(model(x), whole(x))


def test_a_sharded_layer_is_checked_too(mesh):
    model = adapted()
    fully_shard(model, mesh=mesh)
    with torch.no_grad():
        model[0].lora_A.fill_(math.nan)
    with pytest.raises(ValueError, match=r"^its lora_A is NaN or infinite in 14 of 14 elements"):
        model[0].merge()


def test_a_distributed_layer_is_merged_as_it_is(mesh):
    model, x = adapted(), torch.randn(3, 7)
    expected = model(x)
    for layer in model:
        for name, parameter in list(layer.named_parameters()):
            placement = Replicate() if name == "lora_A" else Shard(0)
            placed = distribute_tensor(parameter.detach(), mesh, [placement])
            setattr(layer, name, nn.Parameter(placed, requires_grad=parameter.requires_grad))
    x = distribute_tensor(x, mesh, [Replicate()])
    model[0].merge()
    torch.testing.assert_close(model(x).full_tensor(), expected)
    lorafast.merge(model)
    torch.testing.assert_close(model(x).full_tensor(), expected)


def test_a_layer_merged_before_sharding_serves(mesh):
    model, x = adapted(), torch.randn(3, 7)
    expected = copy.deepcopy(model)(x)
    model[0].merge()
    fully_shard(model, mesh=mesh)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.filterwarnings("ignore:DTensor random operators")
@pytest.mark.parametrize("load", ["to_empty", "assign", "set_model_state_dict"])
def test_adapters_that_were_sharded_on_meta(mesh, load):
    plain, x = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 6)), torch.randn(3, 7)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 6))
    fully_shard(lorafast.adapt(model, 2), mesh=mesh)
    state = {k: distribute_tensor(t, mesh, [Shard(0)]) for k, t in plain.state_dict().items()}
    if load == "to_empty":
        model.to_empty(device="cpu")
        model.load_state_dict(state)
    elif load == "assign":
        model.load_state_dict(state, assign=True)
    else:
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(model, plain.state_dict(), options=options)
    assert model[0].lora_A.full_tensor().any()
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("targets", ["all-linear", ["0"]], ids=str)
def test_a_sharded_model_is_not_adapted(mesh, targets):
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 6))
    fully_shard(model, mesh=mesh)
    with pytest.raises(TypeError, match=r"^the model is sharded by FSDP, expected a whole model"):
        lorafast.adapt(model, 2, targets)
    assert not any(isinstance(module, LoRALinear) for module in model)
    model(torch.randn(3, 7))


def test_what_is_not_sharded_beside_it_is_adapted(mesh):
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 6))
    fully_shard(model[1], mesh=mesh)
    lorafast.adapt(model, 2, ["0"])
    x = torch.randn(3, 7)
    expected = model(x).detach()
    lorafast.merge(model)
    torch.testing.assert_close(model(x), expected)
