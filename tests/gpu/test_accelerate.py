"""PEFT's layers, accelerated, on the device: as right as stock PEFT, and nothing waits for the GPU."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

import peft

import lorafast
from lorafast.reference import contract

pytestmark = pytest.mark.gpu

K, N, r = 512, 768, 16
CASES = {
    "bf16": {},
    "dropout": {"lora_dropout": 0.1},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "embedding": {"target_modules": ["embed"]},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(1000, K)
        self.up = nn.Linear(K, N)

    def forward(self, tokens):
        return self.up(self.embed(tokens))


def model(device, **options):
    settings = {"r": r, "target_modules": ["up"], "init_lora_weights": False} | options
    return peft.get_peft_model(Net().to(device, torch.bfloat16), peft.LoraConfig(**settings))


def gradients(model, tokens):
    model.zero_grad()
    y = model(tokens)
    y.backward(torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype))
    return {"y": y.detach()} | {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("case", [name for name in CASES if name != "dropout"])
def test_as_near_to_float64_as_stock(case, device):
    stock = model(device, **CASES[case])
    fast = lorafast.accelerate(copy.deepcopy(stock), quiet=True)
    assert set(lorafast.explain(fast).layers.values()) == {None}
    tokens = torch.randint(1000, (4, 128), device=device)
    found = {
        "stock": gradients(stock, tokens),
        "fast": gradients(fast, tokens),
        "exact": gradients(copy.deepcopy(stock).double(), tokens),
    }
    # Rounded to the nearest bfloat16: half of its eps.
    halves = {name: right / 2 for name, right in found["exact"].items()}
    bounds = contract.bounds(found["stock"], found["exact"], halves, torch.bfloat16)
    reason = contract.why_any_broken(found["fast"], bounds)
    assert reason is None, reason


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scaling", ["number", "tensor"])
def test_a_step_does_not_wait_for_the_device(case, scaling, device):
    fast = lorafast.accelerate(model(device, **CASES[case]), quiet=True)
    if scaling == "tensor":
        for module in fast.modules():
            if hasattr(module, "lora_variant"):
                module.scaling["default"] = torch.tensor(0.7, device=device)
    tokens = torch.randint(1000, (4, 128), device=device)
    gradients(fast, tokens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(fast, tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_mixed_batch(device):
    stock = model(device)
    stock.add_adapter("second", peft.LoraConfig(r=8, target_modules=["up"]))
    for name, parameter in stock.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    stock.eval()
    fast = lorafast.accelerate(copy.deepcopy(stock), quiet=True)
    tokens = torch.randint(1000, (6, 64), device=device)
    names = ["second", "default", "__base__", "second", "second", "default"]
    with torch.no_grad():
        eager, found = (m(tokens, adapter_names=names) for m in (stock, fast))
        right = copy.deepcopy(stock).double()(tokens, adapter_names=names)
    assert contract.why_broken(found, eager, right, right / 2) is None
