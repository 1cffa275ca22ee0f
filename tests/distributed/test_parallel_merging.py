"""Layers that are cut and sharded by FSDP2 too are merged one by one."""

import pytest
import torch
from ranks import device, mesh_of, on_ranks
from small_decoder import PROJECTIONS, decoder, fill_adapters, tokens
from test_tensor_parallel import EXACT, adapted, error, plan_of
from torch import nn

import lorafast

pytestmark = pytest.mark.slow

LAYERS = ("layers.0.mlp.down_proj", "layers.0.mlp.gate_proj")


def quantized():
    torch.manual_seed(3)
    model = lorafast.quantize(decoder(torch.float64).requires_grad_(False), "nf4", block=8)
    model = lorafast.adapt(model, 3, list(PROJECTIONS))
    fill_adapters(model)
    return model.to(device())


class Whole(nn.Module):
    """A convolution and an attention, which every rank of the plan has whole, and two cut layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.left = nn.Linear(8, 8)
        self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = self.left(x + self.attention(x, x, x, need_weights=False)[0])
        return self.down_proj(self.up_proj(x).relu())


def left_whole():
    torch.manual_seed(3)
    model = lorafast.adapt(Whole().double(), 2, ["attention", "up_proj", "down_proj"])
    lorafast.adapt(model, 2, ["conv", "left"], use_dora=True)
    fill_adapters(model)
    return model.to(device())


def sharded(model, plan):
    """Cut, and over four ranks sharded by FSDP2 too."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    if dist.get_world_size() == 2:
        return lorafast.parallel.parallelize(model, mesh_of(), plan)
    mesh = mesh_of(2, 2, mesh_dim_names=("dp", "tp"))
    lorafast.parallel.parallelize(model, mesh["tp"], plan)
    for block in getattr(model, "layers", ()):
        fully_shard(block, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def _merged(rank):
    from lorafast.parallel import Colwise, Rowwise

    ids = tokens(4)
    x = torch.randn(2, 4, 8, dtype=torch.float64).to(device())
    plan = {"up_proj": Colwise(), "down_proj": Rowwise()}
    kinds = {
        "LoRA": (lambda: adapted(p=0.0), plan_of(None), ids, LAYERS),
        "DoRA": (lambda: adapted(True, p=0.0), plan_of(None), ids, LAYERS),
        "nf4": (quantized, plan_of(None), ids, LAYERS),
        "left whole": (left_whole, plan, x, ("left", "conv", "attention", "up_proj")),
    }
    for kind, (make, styles, given, names) in kinds.items():
        one, two = make().eval(), sharded(make().eval(), styles)
        with torch.no_grad():
            expected = one(given)
            for name in names:
                layer, its = two.get_submodule(name), one.get_submodule(name)
                layer.merge()
                its.merge()
                assert error(two(given), one(given)) < EXACT, (kind, name)
                layer.unmerge()
                its.unmerge()
                assert error(two(given), expected) < EXACT, (kind, name)


@pytest.mark.parametrize(
    "world",
    [pytest.param(2, id="cut"), pytest.param(4, id="cut and sharded")],
)
def test_layers_are_merged_one_by_one(world):
    on_ranks(_merged, world=world)
