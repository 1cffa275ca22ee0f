"""A stock PEFT model, the same one accelerated, and the same one in float64: what is right."""

import copy
from dataclasses import dataclass, field

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorafast
from lorafast.integrations.peft import family, known
from lorafast.reference import contract
from lorafast.reference.dropout import dropout as masked

K, N, TOKENS = 24, 40, 31
_SEEDS = 2**63 - 1


class SameMask(nn.Dropout):
    """A dropout with the mask that ``lora_linear`` draws from the same state of the generator."""

    def forward(self, x):
        if not self.training:
            return x
        seed = torch.randint(_SEEDS, (1,), device=x.device)
        return masked(x.reshape(-1, x.shape[-1]), self.p, seed).reshape(x.shape)


def base(kind="linear", bias=True):
    """A module of one layer, ``layer``."""
    made = {
        "linear": lambda: nn.Linear(K, N, bias=bias),
        "conv1d": lambda: Conv1D(N, K),
        "embedding": lambda: nn.Embedding(TOKENS, N),
        "embedding scaled by a buffer": lambda: ScaledByBuffer(TOKENS, N, 3),
        "embedding scaled by a number": lambda: ScaledByNumber(TOKENS, N),
    }[kind]()
    if kind == "conv1d":
        nn.init.normal_(made.bias)
    return _Named(made)


class ScaledByBuffer(nn.Embedding):
    """As Gemma's, in Transformers."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.embed_scale = nn.Buffer(torch.tensor(6.3), persistent=False)

    def forward(self, input_ids: torch.Tensor):
        return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)


class ScaledByNumber(nn.Embedding):
    """As BART's, in Transformers."""

    embed_scale = 6.3

    def forward(self, input_ids: torch.Tensor):
        return super().forward(input_ids) * self.embed_scale


class _Named(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def config(**options):
    kind = options.pop("kind", "linear")
    defaults = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["layer"],
        "init_lora_weights": False,
        "fan_in_fan_out": kind == "conv1d",
    }
    return LoraConfig(**(defaults | options))


RELATIVES = {
    "VERA": "VeRA", "ADALORA": "AdaLoRA", "IA3": "(IA)³", "OFT": "OFT", "BOFT": "BOFT",
    "LOHA": "LoHa", "LOKR": "LoKr",
}  # fmt: skip
"""LoRA's relatives as PEFT names their types, and as lorafast knows their layers."""


def relative_of_lora(network, settings, **options) -> PeftModel:
    """A model with adapters of another kind, where this release of PEFT has the layers that lorafast
    knows, and its own imports succeed beside the other packages that are installed."""
    kind = RELATIVES[settings.peft_type.value]
    if any(isinstance(module, (nn.Conv1d, nn.Conv2d)) for module in network.modules()):
        kind = f"{kind} convolution"
    assert kind in family.METHODS | family.CONVOLUTIONS
    reason = known.why_changed(kind)
    if reason is not None:
        pytest.skip(reason)
    try:
        return get_peft_model(network, settings, **options)
    except ImportError as error:
        pytest.skip(f"PEFT {peft.__version__}: {error}")


def peft_model(
    kind="linear", dtype=torch.float32, *, bias=True, adapters=1, upcast=False, **options
) -> PeftModel:
    """With ``adapters`` active ones, of different ranks; ``upcast`` keeps them in float32."""
    network = base(kind, bias).to(dtype)
    settings = config(kind=kind, **options)
    model = get_peft_model(network, settings, autocast_adapter_dtype=upcast)
    names = ["default"]
    for i in range(1, adapters):
        names.append(f"other{i}")
        another = config(kind=kind, **(options | {"r": 4 + i}))
        model.add_adapter(names[-1], another, autocast_adapter_dtype=upcast)
    if adapters > 1:
        model.base_model.set_adapter(names)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            nn.init.uniform_(parameter, 0.5, 2.0)
        elif "lora_B" in name and name.endswith("bias"):
            nn.init.normal_(parameter)
    if not upcast:
        model.to(dtype)
    return model


@dataclass
class Run:
    """An output, and the gradient of the input and of every parameter that has one, by name."""

    y: torch.Tensor
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


def run(model, x, dy, seed=0, **arguments) -> Run:
    model.zero_grad()
    if x.is_floating_point():
        x = x.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    y = model(x, **arguments)
    gradients = {}
    if y.requires_grad:
        y.backward(dy.to(y.dtype))
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        if x.is_floating_point():
            gradients["x"] = x.grad
    return Run(y.detach(), gradients)


@dataclass
class Twins:
    stock: nn.Module
    fast: nn.Module
    exact: nn.Module


def twins(model, same_mask=()) -> Twins:
    """``same_mask``: the adapters whose dropout gets the mask of ``lora_linear`` in stock."""
    fast = lorafast.accelerate(copy.deepcopy(model), quiet=True)
    for module in model.modules():
        dropouts = getattr(module, "lora_dropout", {})
        for name in same_mask:
            if name in dropouts:
                dropouts[name] = SameMask(dropouts[name].p)
    exact = copy.deepcopy(model).double()
    return Twins(model, fast, exact)


def assert_equal(pair: Twins, x, dy, dtype, **arguments):
    """Outputs and every gradient of the fast model are as near to float64 as stock's are."""
    stock = run(pair.stock, x, dy, **arguments)
    fast = run(pair.fast, x, dy, **arguments)
    wide = x.double() if x.is_floating_point() else x
    exact = run(pair.exact, wide, dy, **arguments)
    assert_near(*({"y": found.y} | found.gradients for found in (fast, stock, exact)), dtype)


def assert_near(fast, stock, exact, dtype):
    """Tensors by name: ours are as near to float64's as stock's are."""
    reason = contract.why_any_broken(fast, contract.bounds(stock, exact, dtype=dtype))
    assert reason is None, reason


def fast_layers(model) -> set[str]:
    """The names of the layers that are served fast."""
    return {name for name, why in lorafast.explain(model).layers.items() if why is None}


class OwnTensor(torch.Tensor):
    """Not exactly a Tensor."""


def layer_of(model):
    return next(m for m in model.modules() if isinstance(m, LoraLayer))


def hooked(module):
    module.register_forward_hook(lambda module, args, output: output + 1.0)


def stock_and_fast(model, do):
    """The same thing done to a stock layer and to one that has been accelerated."""
    fast = lorafast.accelerate(copy.deepcopy(model), quiet=True)
    assert set(lorafast.explain(fast).layers.values()) == {None}
    do(layer_of(model))
    do(layer_of(fast))
    return model, fast


def assert_same(stock, fast, x, **arguments):
    """Outputs and gradients are the very same: the same code made them."""
    found = []
    for model in (stock, fast):
        model.zero_grad()
        torch.manual_seed(0)
        leaf = x.detach().clone().requires_grad_(x.is_floating_point())
        y = model(leaf, **arguments)
        if y.requires_grad:
            y.sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({"y": y.detach(), "x": leaf.grad} | gradients)
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=0, msg=name)
