"""PEFT models over quantized layers: stock, accelerated, and in float64 over W made dense."""

import logging
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_twins import SameMask
from torch import nn

import lorafast
from lorafast import operands

logging.disable(logging.WARNING)  # it says what it lacks on this machine
bnb = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization")
# Looks at methods, which tests replace.
pytest.importorskip("lorafast.integrations.peft.bnb")
logging.disable(logging.NOTSET)

K, N = 64, 96
"""bitsandbytes' kernel for CPUs misreads rows that blocks of 64 straddle: K is 64."""


class Named(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, **arguments):
        return self.layer(x, **arguments)


def four_bit(kind, nested=True, compute=None):
    """What makes a Linear4bit."""

    def make(dtype, bias):
        layer = bnb.nn.Linear4bit(
            K, N, bias=bias, quant_type=kind, compress_statistics=nested, compute_dtype=compute
        )
        return layer.to(dtype).to("cpu")

    return make


def _eight_bit(dtype, bias):
    return bnb.nn.Linear8bitLt(K, N, bias=bias, has_fp16_weights=False).to(dtype).to("cpu")


def _of_torchao(config):
    def make(dtype, bias):
        model = nn.Sequential(nn.Linear(K, N, bias=bias)).to(dtype)
        torchao.quantize_(model, config)
        return model[0]

    return make


def _options(granularity):
    return {"granularity": granularity, "set_inductor_config": False}


BASES = {
    "nf4": four_bit("nf4"),
    "nf4, plain scales": four_bit("nf4", nested=False),
    "fp4": four_bit("fp4"),
    "int8": _eight_bit,
    "torchao int8 by row": _of_torchao(torchao.Int8WeightOnlyConfig(**_options(torchao.PerRow()))),
    "torchao fp8 by row": _of_torchao(torchao.Float8WeightOnlyConfig(**_options(torchao.PerRow()))),
    "torchao fp8 by tensor": _of_torchao(
        torchao.Float8WeightOnlyConfig(**_options(torchao.PerTensor()))
    ),
}
"""By name: makes a layer of a dtype, with or without a bias."""


def peft_model(
    kind, dtype=torch.float32, *, bias=True, adapters=1, upcast=False, seed=0, base=None, **options
):
    """The same model in each call. (Weights of bitsandbytes and torchao are not all copied right.)"""
    torch.manual_seed(seed)
    network = Named((base or BASES[kind])(dtype, bias))
    network.is_loaded_in_4bit = network.is_loaded_in_8bit = True
    if kind.startswith("torchao"):
        network.is_loaded_in_4bit = network.is_loaded_in_8bit = False
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": ["layer"], "init_lora_weights": False}
    settings = defaults | options
    model = get_peft_model(network, LoraConfig(**settings), autocast_adapter_dtype=upcast)
    names = ["default"]
    for i in range(1, adapters):
        names.append(f"other{i}")
        another = LoraConfig(**(settings | {"r": 4 + i}))
        model.add_adapter(names[-1], another, autocast_adapter_dtype=upcast)
    if adapters > 1:
        model.base_model.set_adapter(names)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            nn.init.uniform_(parameter, 0.5, 2.0)
        if "lora_" in name and not upcast:
            parameter.data = parameter.data.to(dtype)
    return model.train()


def layer_of(model):
    return model.base_model.model.layer


def in_float64(kind, dtype, **options):
    """The same over an ``nn.Linear`` of W, made dense, in float64."""
    source = layer_of(peft_model(kind, dtype, **options)).base_layer
    weight = operands.of_layer(source).to(torch.float32).dense()
    stored = torch.float32 if kind == "int8" else dtype

    def dense(dtype, bias):
        layer = nn.Linear(K, N, bias=bias)
        layer.weight.data = weight.to(stored).to(dtype).double()
        if bias:
            layer.bias.data = source.bias.detach().double()
        return layer

    made = peft_model(kind, dtype, base=dense, **options)
    stock = dict(peft_model(kind, dtype, **options).named_parameters())
    for name, parameter in made.named_parameters():
        if "base_layer" not in name:
            parameter.data = stock[name].detach().double()
    return made.double()


@dataclass
class Twins:
    stock: nn.Module
    fast: nn.Module
    exact: nn.Module


def twins(kind, dtype, same_mask=False, **options):
    """``same_mask``: the dropout of stock gets the mask of ``lora_linear``."""
    fast = lorafast.accelerate(peft_model(kind, dtype, **options), quiet=True)
    stock, exact = peft_model(kind, dtype, **options), in_float64(kind, dtype, **options)
    for model in (stock, exact):
        dropouts = layer_of(model).lora_dropout
        for name in dropouts if same_mask else ():
            dropouts[name] = SameMask(dropouts[name].p)
    return Twins(stock, fast, exact)
