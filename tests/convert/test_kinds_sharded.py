"""Adapters of every kind in a model that FSDP2 shards: trained, saved, loaded, merged, begun on meta."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import lorafast

TOKENS = torch.tensor([[1, 5, 2], [0, 5, 8]])


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.up = nn.Linear(4, 5)

    def forward(self, x):
        return self.up(self.embed(x))


def of_embeddings():
    return lorafast.adapt(Tokens(), 2, ["embed", "up"])


def of_dora():
    return lorafast.adapt(Tokens(), 2, ["up"], use_dora=True)


def of_both():
    return lorafast.adapt(Tokens(), 2, ["embed", "up"], use_dora=True)


KINDS = pytest.mark.parametrize("make", [of_embeddings, of_dora, of_both])


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@KINDS
def test_output_and_gradients(mesh, draw_adapters, make):
    model = draw_adapters(make())
    single = copy.deepcopy(model)
    fully_shard(model, mesh=mesh)
    for net in (model, single):
        net(TOKENS).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in single.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(whole(gradient), expected[name])
    torch.testing.assert_close(model(TOKENS), single(TOKENS))


@KINDS
def test_files(mesh, tmp_path, draw_adapters, make):
    pytest.importorskip("safetensors")
    model = draw_adapters(make())
    expected = model(TOKENS)
    base = {name: tensor for name, tensor in model.state_dict().items() if "lora" not in name}
    fully_shard(model, mesh=mesh)
    lorafast.save_adapter(model, tmp_path)
    other = make()
    other.load_state_dict(base, strict=False)
    fully_shard(other, mesh=mesh)
    lorafast.load_adapter(other, tmp_path)
    torch.testing.assert_close(other(TOKENS), expected)


@KINDS
def test_one_layer_is_merged(mesh, draw_adapters, make):
    model = draw_adapters(make())
    expected = model(TOKENS)
    fully_shard(model, mesh=mesh)
    layers = [layer for layer in model.modules() if isinstance(layer, lorafast.nn.AdapterLayer)]
    for layer in layers:
        layer.merge()
    for _ in range(2):
        torch.testing.assert_close(model(TOKENS), expected)
    for layer in layers:
        layer.unmerge()
    torch.testing.assert_close(model(TOKENS), expected)


@KINDS
def test_begun_on_meta(mesh, make):
    plain = Tokens()
    with torch.device("meta"):
        model = make()
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert model(TOKENS).isfinite().all()
    state = {name: distribute_tensor(t, mesh) for name, t in plain.state_dict().items()}
    assert model.load_state_dict(state) == ([], [])
    torch.testing.assert_close(model(TOKENS), plain(TOKENS))
