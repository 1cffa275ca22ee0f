"""FSDP2 and DTensor, in one process: whole layers stay fast, what is sharded beneath one is PEFT's."""

import copy

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("peft")

from peft.tuners.lora.layer import Linear
from peft_twins import K, N, peft_model, run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor

import lorafast


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def served_by_peft(monkeypatch):
    calls = []
    stock = Linear.forward

    def forward(self, *args, **kwargs):
        calls.append(self)
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(Linear, "forward", forward)
    return calls


def gradients(model, x, dy):
    found = run(model, x, dy)
    whole = {
        n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.gradients.items()
    }
    return {"y": found.y} | whole


@pytest.mark.parametrize(
    "shard",
    [lambda model: model, lambda model: model.base_model.model.layer],
    ids=["model", "layer"],
)
def test_a_whole_layer_is_fast(mesh, served_by_peft, shard):
    fast = lorafast.accelerate(peft_model(), quiet=True)
    x, dy = torch.randn(5, K), torch.randn(5, N)
    expected = gradients(copy.deepcopy(fast), x, dy)
    fully_shard(shard(fast), mesh=mesh)
    for name, value in gradients(fast, x, dy).items():
        torch.testing.assert_close(value, expected[name], msg=name)
    assert served_by_peft == []
    assert "FSDP's are whole in its forward" in str(lorafast.explain(fast))
    if type(fast.base_model.model.layer).__name__ == "FSDPLinear":
        with pytest.raises(ValueError, match=r"base_model.model.layer was given the class FSDPLin"):
            lorafast.restore(fast)


def test_a_sharded_base_layer(mesh, served_by_peft):
    fast = lorafast.accelerate(peft_model(), quiet=True)
    x, dy = torch.randn(5, K), torch.randn(5, N)
    expected = gradients(copy.deepcopy(fast), x, dy)
    fully_shard(fast.base_model.model.layer.base_layer, mesh=mesh)
    assert "its base layer is a FSDPLinear" in str(lorafast.explain(fast))
    for name, value in gradients(fast, x, dy).items():
        torch.testing.assert_close(value, expected[name], msg=name)
    assert len(served_by_peft) == 1


def test_dtensors(mesh, served_by_peft):
    fast = lorafast.accelerate(peft_model(), quiet=True)
    x = torch.randn(5, K)
    expected = fast(x)
    for module in fast.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                placed = distribute_tensor(parameter.detach(), mesh, [Replicate()])
                module._parameters[name] = torch.nn.Parameter(placed)
    assert "has a DTensor" in str(lorafast.explain(fast))
    found = fast(distribute_tensor(x, mesh, [Replicate()])).full_tensor()
    torch.testing.assert_close(found, expected)
    assert len(served_by_peft) == 1
