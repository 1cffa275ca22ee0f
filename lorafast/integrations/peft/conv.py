"""LoRA over a convolution: which of PEFT's calls are served fast, and how."""

from typing import Any

import torch
from torch import Tensor

from lorafast import functional
from lorafast.integrations.peft import conv_rules
from lorafast.integrations.peft.adapters import Adapter, active, settled, with_gradient


def forward(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The layer's output, or None where PEFT serves the call itself."""
    if args or kwargs:
        return None
    adapters = active(layer)
    if conv_rules.why_stock_conv(layer, adapters, x) is not None:
        return None
    base = layer._modules["base_layer"]
    parameters = base._parameters
    weight = parameters["weight"]
    lora_A, lora_B, scaling, added = _as_one(adapters)
    bias, wider = parameters["bias"], None
    if added is not None:
        if added.dtype is not weight.dtype:
            wider, added = added, added.detach()
        bias = (added if bias is None else bias + added).to(weight.dtype)
    first, magnitude = adapters[0], None
    if first.name in layer.lora_variant:
        magnitude = layer.lora_magnitude_vector[first.name].weight
    y = functional.lora_conv(
        x, weight, lora_A, lora_B, scaling, bias, stride=base.stride,
        padding=base.padding, dilation=base.dilation, groups=base.groups, magnitude=magnitude,
        # Of DoRA PEFT asks the layer beside the dropout.
        dropout_p=first.dropout_p, training=magnitude is None or layer.training,
    )  # fmt: skip
    return y if wider is None else with_gradient(y, wider.view(-1, *[1] * (y.dim() - 2)))


def _as_one(adapters: list[Adapter]) -> tuple[Tensor, Tensor, float, Tensor | None]:
    """A, B, scaling and what is added to the bias, of the sum: A's stacked, B's side by side."""
    bias = None
    for adapter in adapters:
        own = adapter.lora_B._parameters["bias"]
        if own is not None:
            added = own * adapter.scaling
            bias = added if bias is None else bias + added
    first, *others = adapters
    lora_A, lora_B = (m._parameters["weight"] for m in (first.lora_A, first.lora_B))
    if not others:
        if torch.compiler.is_compiling() and not isinstance(first.scaling, Tensor):
            return lora_A, lora_B, first.scaling, bias  # which lora_conv folds into B, unrounded
        return lora_A, *settled(lora_B, first.scaling), bias
    every_A = [adapter.lora_A._parameters["weight"] for adapter in adapters]
    every_B = [a.lora_B._parameters["weight"] * a.scaling for a in adapters]
    return torch.cat(every_A), torch.cat(every_B, 1), 1.0, bias
