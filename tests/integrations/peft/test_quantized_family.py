"""VeRA, OFT and BOFT over quantized layers, as PEFT has them there: against it and W made dense."""

import pytest
import torch

pytest.importorskip("peft")

import peft
from peft_twins import relative_of_lora, run
from quantized_twins import BASES, K, N, Named
from torch import nn

import lorafast
from lorafast import operands
from lorafast.reference import contract

KINDS = {
    "VeRA": lambda: peft.VeraConfig(r=5, target_modules=["layer"]),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=8, target_modules=["layer"]),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=8, target_modules=["layer"]),
}


def made(kind, base, dtype):
    """The same model in each call."""
    torch.manual_seed(0)
    network = Named(base(dtype, True))
    torch.manual_seed(1)
    model = relative_of_lora(network, KINDS[kind](), autocast_adapter_dtype=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, 0.0, 0.1)
    return model.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_over_a_quantized_layer(kind, base, dtype):
    stock, fast = made(kind, BASES[base], dtype), made(kind, BASES[base], dtype)
    lorafast.accelerate(fast, quiet=True)
    assert set(lorafast.explain(fast).layers.values()) == {None}
    source = fast.base_model.model.layer.base_layer

    def dense(dtype, bias):
        layer = nn.Linear(K, N).double()
        stored = torch.float32 if base == "int8" else dtype
        layer.weight.data = operands.of_layer(source).to(torch.float32).dense().to(stored).double()
        layer.bias.data = source.bias.detach().double()
        return layer

    exact = made(kind, dense, dtype).double()
    x, dy = torch.randn(3, 5, K).to(dtype), torch.randn(3, 5, N).to(dtype)
    found, eager, right = run(fast, x, dy), run(stock, x, dy), run(exact, x.double(), dy)
    bounds = contract.bounds(
        {"y": eager.y} | eager.gradients, {"y": right.y} | right.gradients, dtype=dtype
    )
    reason = contract.why_any_broken({"y": found.y} | found.gradients, bounds)
    assert reason is None, reason
