"""What a forward reads of PEFT's layer: looked up in each call, for PEFT replaces any of it."""

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafast.operands import kept_transposed


class Adapter(NamedTuple):
    """One adapter of a layer over a linear one. ``scaling`` is a number or a 0-dim tensor."""

    name: str
    lora_A: Any
    lora_B: Any
    dropout: Any
    scaling: Any

    @property
    def dropout_p(self) -> float:
        """The probability with which an element is dropped now."""
        dropout = self.dropout
        p: float = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
        return p


def active(layer: Linear) -> list[Adapter]:
    """The active adapters that this layer has, in order."""
    names = layer._active_adapter
    return named(layer, (names,) if isinstance(names, str) else names)


def named(layer: Linear, names: Any) -> list[Adapter]:
    """The adapters of these names, those that this layer has."""
    modules = layer._modules  # nn.Module's own lookup of a name takes ten times as long
    every_A, every_B = modules["lora_A"]._modules, modules["lora_B"]._modules
    dropouts, scaling = modules["lora_dropout"]._modules, layer.scaling
    return [
        Adapter(name, every_A[name], every_B[name], dropouts[name], scaling[name])
        for name in names
        if name in every_A
    ]


def settled(lora_B: Tensor, scaling: Any) -> tuple[Tensor, float]:
    """B and a scaling that is a number, together what these two are.

    The value of a tensor must not be asked for, or a GPU waits; nor that of a number in compiled code,
    or it holds for that number alone.
    """
    if isinstance(scaling, Tensor) or torch.compiler.is_compiling():
        return lora_B * scaling, 1.0
    return lora_B, float(scaling)


def weight_of(base: nn.Module) -> Tensor:
    """``[N, K]``, of ``Conv1D`` a view."""
    weight: Any = base._parameters["weight"]
    return kept_transposed(weight) if type(base) is Conv1D else weight
