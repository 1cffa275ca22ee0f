"""FSDP2 in one process: what is sharded is not merged, and says so."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

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


@pytest.mark.parametrize("call", ["merge", "to_linear"])
def test_a_sharded_layer_is_refused_and_goes_on(mesh, call):
    model, x = adapted(), torch.randn(3, 7)
    expected = copy.deepcopy(model)(x)
    fully_shard(model, mesh=mesh)
    with pytest.raises(
        ValueError, match=r"^its weight is a DTensor, a shard: merge before the model"
    ):
        getattr(model[0], call)()
    assert not model[0].merged
    torch.testing.assert_close(model(x), expected)


def test_a_layer_merged_before_sharding_serves(mesh):
    model, x = adapted(), torch.randn(3, 7)
    expected = copy.deepcopy(model)(x)
    model[0].merge()
    fully_shard(model, mesh=mesh)
    torch.testing.assert_close(model(x), expected)


def test_a_sharded_model_is_not_adapted(mesh):
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 6))
    fully_shard(model, mesh=mesh)
    with pytest.raises(TypeError, match="its weight is a DTensor, a shard: adapt the model before"):
        lorafast.adapt(model, 2, ["0"])
    assert not any(isinstance(module, LoRALinear) for module in model)
