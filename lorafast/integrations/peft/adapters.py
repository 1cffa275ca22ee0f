"""Reads the adapters of one of PEFT's layers, anew in each call: PEFT may have replaced any part."""

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafast.core.context import needs_plain_pytorch
from lorafast.integrations.peft import quantized
from lorafast.operands import Weight, kept_transposed


class Adapter(NamedTuple):
    """One adapter of a ``lora.Linear``. ``scaling`` is a number or a 0-dim tensor."""

    name: str
    lora_A: Any
    lora_B: Any
    dropout: Any
    scaling: Any

    @property
    def dropout_p(self) -> float:
        """The probability of dropping an element; 0 unless it is in training."""
        dropout = self.dropout
        p: float = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
        return p


def active(layer: Linear) -> list[Adapter]:
    """The layer's active adapters, in order."""
    names = layer._active_adapter
    return named(layer, (names,) if isinstance(names, str) else names)


def named(layer: Linear, names: Any) -> list[Adapter]:
    """The layer's adapters of these names; names that it doesn't have are passed over."""
    modules = layer._modules  # nn.Module's own lookup of a name takes ten times as long
    every_A, every_B = modules["lora_A"]._modules, modules["lora_B"]._modules
    dropouts, scaling = modules["lora_dropout"]._modules, layer.scaling
    return [
        Adapter(name, every_A[name], every_B[name], dropouts[name], scaling[name])
        for name in names
        if name in every_A
    ]


def settled(lora_B: Tensor, scaling: Any) -> tuple[Tensor, float]:
    """B and a scaling that is a number, whose product is ``lora_B * scaling``.

    A scaling that is a tensor is multiplied into B: reading its value would make the host wait for the
    GPU. In compiled code a number is too: otherwise the graph would hold for that number alone.
    """
    if isinstance(scaling, Tensor) or torch.compiler.is_compiling():
        return lora_B * scaling, 1.0
    return lora_B, float(scaling)


def with_gradient(y: Tensor, bias: Tensor) -> Tensor:
    """``y``, in which ``bias`` is as a constant, with the gradient of ``bias``.

    ``bias`` broadcasts to ``y`` and is of a wider dtype. The sum of ``dy`` is taken in that one: float16
    may not hold it, and bfloat16 would round it.
    """
    if not bias.requires_grad and needs_plain_pytorch(torch.compiler.is_compiling()) is None:
        return y
    finite = bias.nan_to_num(0.0, 0.0, 0.0)
    return (y + (finite - finite.detach())).to(y.dtype)


def weight_of(base: nn.Module) -> Weight:
    """The weight ``[N, K]`` of a base layer; a view for ``Conv1D``, which keeps it transposed."""
    if quantized.is_one(base):
        return quantized.weight_of(base)
    weight: Any = base._parameters["weight"]
    return kept_transposed(weight) if type(base) is Conv1D else weight
