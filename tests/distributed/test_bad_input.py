"""What a model in several processes refuses, in a sentence."""

import pytest
import torch
from kinds_of_models import adapted, inputs, loss
from ranks import device, mesh_of, on_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import lorafast

ALONE = (
    "is sharded (a DTensor) and x is not, expected a whole tensor: shard layers or blocks, not the "
    "parameters of one by themselves"
)


def _distribute(module):
    mesh = mesh_of()
    for name in module.peft_names:
        parameter = module._parameters.get(name)
        if parameter is not None:
            placed = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            module._parameters[name] = nn.Parameter(placed)


def _a_layer(model):
    return next(m for m in model.modules() if isinstance(m, lorafast.nn.AdapterLayer))


def _sharded_alone(rank, kind, how):
    """The first sentence of what a forward raises."""
    model = adapted(kind)
    if how == "A and B":
        _distribute(_a_layer(model))
    elif how == "a child":
        fully_shard(model.attention.out_proj)
    else:
        layer = fully_shard(model.lm_head)
        model.lm_head = nn.Identity()
        model.lm_head.forward = layer.forward  # past FSDP's hooks
    try:
        loss(model, inputs(kind, 2))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("dora", "A and B"), ("lora", "its forward alone"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("nf4", "A and B"), ("embedding", "A and B"), ("conv", "A and B"),
                ("attention", "a child"),
            )
        ),
    ],
)  # fmt: skip
def test_parameters_that_were_sharded_alone(kind, how):
    for message in on_ranks(_sharded_alone, kind, how):
        assert message.split(" ", 1)[1].startswith(ALONE), message


class FP8Linear(nn.Linear):
    """A weight in float8 and its scales as parameters, as Transformers' class of this name."""

    def __init__(self):
        super().__init__(64, 128, bias=False)
        codes = (self.weight.detach() * 100).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(torch.tensor([[0.01]]), requires_grad=False)
        self.block_size = (128, 128)


def _fp8_parameters(rank, policy):
    torch.manual_seed(0)
    model = lorafast.adapt(nn.Sequential(FP8Linear()), 2).to(device())
    nn.init.normal_(model[0].lora_B)
    x = torch.randn(3, 64, device=device())
    expected = model(x).detach()
    before = model[0].weight.detach().view(torch.uint8).clone()
    fully_shard(model, mp_policy=policy)
    shards = model[0].weight
    try:
        return torch.equal(model(x), expected), ""
    except ValueError as error:
        own = before.chunk(2)[rank]
        return torch.equal(shards.to_local().view(torch.uint8), own), str(error)


def test_a_policy_that_casts_codes():
    """It is refused before anything is computed, and the shards keep their codes."""
    for same, message in on_ranks(_fp8_parameters, MixedPrecisionPolicy()):
        assert (same, message) == (True, "")
    for same, message in on_ranks(_fp8_parameters, MixedPrecisionPolicy(torch.bfloat16)):
        assert same
        assert "weight is torch.bfloat16" in message
        assert "MixedPrecisionPolicy" in message
