"""Adapters of sharded models: gathered when they are saved, sharded when they are loaded."""

import pytest
import torch
import torch.distributed as dist
from adapter_files import DOWN_A, DOWN_B, UP_A, UP_B, WEIGHTS, good_tensors, read, write_adapter
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

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


def test_a_rank_that_is_not_the_first_writes_nothing(mesh, net, tmp_path, monkeypatch):
    fully_shard(lorafast.adapt(net, 2), mesh=mesh)
    monkeypatch.setattr(type(mesh), "get_coordinate", lambda self: [1])
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


def test_refuses_to_adapt_what_is_sharded(mesh, net, tmp_path):
    fully_shard(net, mesh=mesh)
    with pytest.raises(ValueError, match=r"block\.(up|down) is sharded"):
        lorafast.load_adapter(net, write_adapter(tmp_path))
    assert type(net.block.up) is nn.Linear


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
