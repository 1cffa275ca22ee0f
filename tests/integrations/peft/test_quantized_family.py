"""LoRA's relatives over quantized layers, as PEFT has them there: against it and W made dense."""

import pytest
import torch

pytest.importorskip("peft")

import peft
from helpers import covering
from peft_twins import relative_of_lora, run
from quantized_twins import BASES, K, N, Named, four_bit
from torch import nn

import lorafast
from lorafast import operands
from lorafast.integrations.peft import low_rank
from lorafast.reference import contract

KINDS = {
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        init_r=5, lora_alpha=3, total_step=20, target_modules=["layer"]
    ),
    "(IA)3": lambda: peft.IA3Config(feedforward_modules=[], target_modules=["layer"]),
    "(IA)3, feed-forward": lambda: peft.IA3Config(
        feedforward_modules=["layer"], target_modules=["layer"]
    ),
    "VeRA": lambda: peft.VeraConfig(r=5, target_modules=["layer"]),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=8, target_modules=["layer"]),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=8, target_modules=["layer"]),
}


def made(kind, base, dtype):
    """The same model in each call."""
    torch.manual_seed(0)
    network = Named(base(dtype, True))
    if kind.startswith(("AdaLoRA", "(IA)3")):  # which ask the model, where others ask the layer
        network.is_loaded_in_4bit = network.is_loaded_in_8bit = True
    torch.manual_seed(1)
    model = relative_of_lora(network, KINDS[kind](), autocast_adapter_dtype=True)
    for name, parameter in model.named_parameters():
        if "ranknum" in name:
            parameter.requires_grad = (
                False  # as PEFT means it, which has it otherwise over nn.Linear
            )
        elif parameter.requires_grad:
            nn.init.normal_(parameter, 0.0, 0.1)
    return model.train()


APART = {
    "nf4, in bf16": four_bit("nf4", compute=torch.bfloat16),
    "nf4, in fp32": four_bit("nf4", compute=torch.float32),
}
"""Whose products have a dtype of their own."""
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("kind", "base", "dtype", "few"),
    covering(list(KINDS), ["nf4", "int8", *APART], DTYPES, (0, 1 << 20)),
)
def test_over_a_quantized_layer(monkeypatch, kind, base, dtype, few):
    monkeypatch.setattr(low_rank, "_FEW", few)
    of = (BASES | APART)[base]
    stock, fast = made(kind, of, dtype), made(kind, of, dtype)
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
    assert found.y.dtype is eager.y.dtype
    bounds = contract.bounds(
        {"y": eager.y} | eager.gradients,
        {"y": right.y} | right.gradients,
        dtype=torch.bfloat16 if "bf16" in base else dtype,
    )
    reason = contract.why_any_broken({"y": found.y} | found.gradients, bounds)
    assert reason is None, reason


@pytest.mark.parametrize("kind", ["(IA)3", "(IA)3, feed-forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_dtypes_under_autocast(kind, dtype, base):
    stock, fast = made(kind, BASES[base], dtype), made(kind, BASES[base], dtype)
    lorafast.accelerate(fast, quiet=True)
    x = torch.randn(3, 5, K).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(x).dtype is stock(x).dtype
