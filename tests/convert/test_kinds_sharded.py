"""Adapters of every kind in a model that FSDP2 shards: trained, saved, loaded, merged, begun on meta."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
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


class Filters(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.down = nn.Conv1d(4, 6, 3, padding=1)
        self.point = nn.Conv2d(6, 5, 1, bias=False)

    def forward(self, x):
        x = torch.tanh(self.down(self.embed(x).movedim(-1, 1)))
        return self.point(x.unsqueeze(-2).contiguous(memory_format=torch.channels_last))


def of_convolutions():
    return lorafast.adapt(Filters(), 2, ["down", "point"])


def of_dora_convolutions():
    return lorafast.adapt(Filters(), 2, ["down", "point"], use_dora=True)


BASES = {of_convolutions: Filters, of_dora_convolutions: Filters}


def of_embeddings():
    return lorafast.adapt(Tokens(), 2, ["embed", "up"])


def of_dora():
    return lorafast.adapt(Tokens(), 2, ["up"], use_dora=True)


def of_both():
    return lorafast.adapt(Tokens(), 2, ["embed", "up"], use_dora=True)


KINDS = pytest.mark.parametrize(
    "make", [of_embeddings, of_dora, of_both, of_convolutions, of_dora_convolutions]
)


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


def test_files_of_bottlenecks(mesh, tmp_path):
    pytest.importorskip("safetensors")
    plain = Tokens()
    model = lorafast.adapt(copy.deepcopy(plain), kind="pfeiffer", targets=["up"], init="bert")
    lorafast.save_adapter(model, tmp_path)
    sharded = fully_shard(copy.deepcopy(plain), mesh=mesh)
    with pytest.raises(ValueError, match="the model is sharded by FSDP, expected a whole model"):
        lorafast.load_adapter(sharded, tmp_path)
    other = lorafast.adapt(plain, kind="pfeiffer", targets=["up"], init="bert")
    fully_shard(other, mesh=mesh)
    lorafast.load_adapter(other, tmp_path)
    assert isinstance(other.up.bottleneck.down, DTensor)
    torch.testing.assert_close(other(TOKENS), model(TOKENS))


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
    plain = BASES.get(make, Tokens)()
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


def _train_on_each_rank(rank, world, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    for make in (of_convolutions, of_dora_convolutions):
        torch.manual_seed(0)
        model = make()
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p)
        single = copy.deepcopy(model)
        for module in (model.down, model.point, model):
            fully_shard(module, mesh=mesh)
        optimizers = [
            torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
            for net in (model, single)
        ]
        for _ in range(2):
            # Each rank has one row of the batch, and FSDP takes the mean of their gradients.
            for net, rows in ((model, TOKENS[rank : rank + 1]), (single, TOKENS)):
                net(rows).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        expected = dict(single.named_parameters())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(whole(parameter), expected[name], msg=f"{make} {name}")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort a process that ends by itself


@pytest.mark.slow
def test_convolutions_train_on_two_ranks(tmp_path):
    mp.spawn(_train_on_each_rank, (2, str(tmp_path / "rendezvous")), nprocs=2)
