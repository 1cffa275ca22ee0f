"""Adapters of sharded models: gathered when they are saved, sharded when they are loaded."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from adapter_files import DOWN_A, DOWN_B, UP_A, UP_B, WEIGHTS, good_tensors, read, write_adapter
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

import lorafast


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("inside", ["block.up", "block", ""], ids=["layer", "block", "model"])
def test_fsdp2_saves_whole_tensors(mesh, net, make_net, tmp_path, draw_adapters, inside):
    draw_adapters(lorafast.adapt(net, 2, ["up", "down"]))
    expected = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    fully_shard(net.get_submodule(inside), mesh=mesh)
    fully_shard(net, mesh=mesh) if inside else None
    assert isinstance(net.block.up.lora_A, DTensor)
    lorafast.save_adapter(net, tmp_path / "new", modules_to_save=["head"])
    config, tensors = read(tmp_path / "new")
    assert len(tensors) == 6
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.").removesuffix(".weight")
        assert torch.equal(tensor, expected.get(name, expected.get(f"{name}.weight"))), key
    assert config["auto_mapping"]["base_model_class"] == "Net"
    other = lorafast.load_adapter(make_net(), tmp_path / "new")
    assert torch.equal(other.block.up.lora_B, expected["block.up.lora_B"])


@pytest.mark.parametrize("coordinate", [[1], None], ids=["second", "outside"])
def test_a_rank_that_is_not_the_first_writes_nothing(mesh, net, tmp_path, monkeypatch, coordinate):
    fully_shard(lorafast.adapt(net, 2), mesh=mesh)
    monkeypatch.setattr(type(mesh), "get_coordinate", lambda self: coordinate)
    lorafast.save_adapter(net, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_loads_into_a_sharded_adapted_model(mesh, net, tmp_path):
    fully_shard(lorafast.adapt(net, 2, ["up", "down"]), mesh=mesh)
    lorafast.load_adapter(net, write_adapter(tmp_path))
    layers = {UP_A: net.block.up.lora_A, UP_B: net.block.up.lora_B,
              DOWN_A: net.block.down.lora_A, DOWN_B: net.block.down.lora_B}  # fmt: skip
    for key, parameter in layers.items():
        assert isinstance(parameter, DTensor)
        assert torch.equal(parameter.full_tensor(), good_tensors()[key].double()), key


TWO_RANKS = """
import os, sys
from collections import OrderedDict
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import lorafast

def make():
    torch.manual_seed(3)
    return nn.Sequential(OrderedDict(up=nn.Linear(5, 7), head=nn.Linear(7, 3)))

def adapted():
    model = lorafast.adapt(make(), 2, ["up"])
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model

rank = 0 if os.fork() else 1
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 2), rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
model = adapted()
fully_shard(model, mesh=mesh)
lorafast.save_adapter(model, sys.argv[2], modules_to_save=["head"])
dist.barrier()
expected = adapted().state_dict()
plain = lorafast.load_adapter(make(), sys.argv[2])
sharded = lorafast.adapt(make(), 2, ["up"])
fully_shard(sharded, mesh=mesh)
lorafast.load_adapter(sharded, sys.argv[2])
assert sharded.up.lora_B.to_local().shape == (4 - rank, 2)
found = {name: tensor.full_tensor() for name, tensor in sharded.state_dict().items()}
for name in ("up.lora_A", "up.lora_B", "head.weight", "head.bias"):
    assert torch.equal(plain.state_dict()[name], expected[name]), name
    assert torch.equal(found[name], expected[name]), name
dist.destroy_process_group()
if rank == 1:
    os._exit(0)
assert os.wait()[1] == 0
"""


@pytest.mark.slow
def test_two_ranks_save_and_load(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", TWO_RANKS, tmp_path / "store", tmp_path / "adapter"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert len(read(tmp_path / "adapter")[1]) == 4


@pytest.mark.parametrize("called", [False, True], ids=["", "after-a-forward"])
def test_refuses_to_adapt_what_is_sharded(mesh, net, x, unchanged, tmp_path, called):
    fully_shard(net, mesh=mesh)
    if called:
        net(x)  # after which the outermost module's parameters stay whole
        assert not isinstance(net.block.up.weight, DTensor)
    with unchanged(net), pytest.raises(ValueError, match="the model is sharded by FSDP: load the"):
        lorafast.load_adapter(net, write_adapter(tmp_path))
    assert type(net.block.up) is nn.Linear


def test_refuses_to_adapt_a_layer_of_dtensors(mesh, net, tmp_path):
    weight = distribute_tensor(net.block.up.weight.detach(), mesh, [Replicate()])
    net.block.up.weight = nn.Parameter(weight)
    with pytest.raises(ValueError, match=r"block\.up is sharded: load the adapter before"):
        lorafast.load_adapter(net, write_adapter(tmp_path))


def test_refuses_the_flat_parameters_of_the_first_fsdp(mesh, net, tmp_path):
    lorafast.adapt(net, 2)
    model = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(ValueError, match="FullyShardedDataParallel"):
        lorafast.save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_refuses_a_shard_that_it_can_not_gather(net, tmp_path):
    lorafast.adapt(net, 2)
    net.block.up.lora_A = nn.Parameter(torch.empty(0))
    with pytest.raises(ValueError, match=r"lora_A of block\.up has shape \[0\], expected \[2, 5\]"):
        lorafast.save_adapter(net, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_no_folder_stays_where_nothing_can_be_written(net, tmp_path, monkeypatch):
    import safetensors.torch

    def full(*arguments, **options):
        raise safetensors.SafetensorError("no space left on device")

    lorafast.adapt(net, 2)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match=rf"new/adapter/{WEIGHTS} can't be written: no space left"):
        lorafast.save_adapter(net, tmp_path / "new" / "adapter")
    assert not (tmp_path / "new").exists()
