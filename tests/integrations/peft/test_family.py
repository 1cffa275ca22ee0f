"""VeRA, AdaLoRA, (IA)³, LoHa and LoKr against stock PEFT: outputs, gradients by name, what is left."""

import copy

import pytest
import torch

peft = pytest.importorskip("peft")

from helpers import covering
from peft_twins import K, N, assert_equal, base, twins
from torch import nn

import lorafast
from lorafast.integrations.peft import family, layers

DTYPES = {
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "bf16, fp32 adapters": (torch.bfloat16, True),
    "fp16, fp32 adapters": (torch.float16, True),
}
KINDS = {
    "VeRA": lambda **o: peft.VeraConfig(r=5, projection_prng_key=7, **o),
    "AdaLoRA": lambda **o: peft.AdaLoraConfig(init_r=5, lora_alpha=3, total_step=20, **o),
    "(IA)3": lambda **o: peft.IA3Config(feedforward_modules=[], **o),
    "(IA)3, feed-forward": lambda **o: peft.IA3Config(feedforward_modules=["layer"], **o),
    "LoHa": lambda **o: peft.LoHaConfig(r=2, alpha=3, **o),
    "LoKr": lambda **o: peft.LoKrConfig(r=8, alpha=3, **o),
    "LoKr, w2 of rank r": lambda **o: peft.LoKrConfig(r=2, alpha=3, **o),
    "LoKr, both of rank r": lambda **o: peft.LoKrConfig(r=1, alpha=3, decompose_both=True, **o),
}
DROPS = {"VeRA": "vera_dropout", "AdaLoRA": "lora_dropout"}


def made(kind, dtype=torch.float32, *, layer="linear", upcast=False, adapters=1, **options):
    """A model of one layer whose adapters are drawn, not what they begin as."""
    options = {"target_modules": ["layer"]} | options
    if layer == "conv1d":
        options["fan_in_fan_out"] = True
    model = peft.get_peft_model(
        base(layer).to(dtype), KINDS[kind](**options), autocast_adapter_dtype=upcast
    )
    names = ["default"]
    for i in range(1, adapters):
        names.append(f"other{i}")
        more = {"inference_mode": True} if kind == "AdaLoRA" else {}  # it trains one alone
        settings = KINDS[kind](**options, **more)
        model.add_adapter(names[-1], settings, autocast_adapter_dtype=upcast)
    if adapters > 1:
        model.base_model.set_adapter(names)
    for name, tensor in model.named_parameters():
        if "base_layer" not in name and "ranknum" not in name:
            nn.init.normal_(tensor)
            tensor.requires_grad = True
    if not upcast:
        model.to(dtype)
    return model


@pytest.fixture
def never_stock(monkeypatch):
    """PEFT's own forward must not be what made a fast model right."""
    for fast in list(layers.FAST.values()):
        if issubclass(fast, layers.FastKind):

            def refuse(self, *args, _forward=fast._stock.forward, **kwargs):
                assert type(self) not in layers.FAST.values(), "served by PEFT"
                return _forward(self, *args, **kwargs)

            monkeypatch.setattr(fast._stock, "forward", refuse)


def drawn(dtype):
    return torch.randn(3, 5, K).to(dtype), torch.randn(3, 5, N).to(dtype)


@pytest.mark.parametrize(("kind", "dtype", "adapters"), covering(list(KINDS), list(DTYPES), (1, 2)))
def test_outputs_and_gradients(never_stock, kind, dtype, adapters):
    dtype, upcast = DTYPES[dtype]
    model = made(kind, dtype, upcast=upcast, adapters=adapters)
    assert_equal(twins(model), *drawn(dtype), dtype)
