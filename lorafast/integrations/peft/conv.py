"""LoRA over a convolution: which of PEFT's calls are served fast, and how."""

from typing import Any

import torch
from torch import Tensor

from lorafast import functional
from lorafast.core.context import without_autocast
from lorafast.core.convolution import is_channels_last
from lorafast.integrations.peft import by_element, conv_rules, mixed
from lorafast.integrations.peft.adapters import Adapter, active, named, settled, with_gradient
from lorafast.ops import weight_norm


def forward(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The layer's output, or None where PEFT serves the call itself."""
    if args or kwargs.keys() - conv_rules.ARGUMENTS:
        return None
    if kwargs.get("adapter_names") is not None:
        return _mixed(layer, x, kwargs["adapter_names"])
    adapters = active(layer)
    if conv_rules.why_stock_conv(layer, adapters, x) is not None:
        return None
    base = layer._modules["base_layer"]
    if len(adapters) > 1 and any(adapter.name in layer.lora_variant for adapter in adapters):
        return _in_turn(layer, x, base, adapters)
    parameters = base._parameters
    weight = parameters["weight"]
    lora_A, lora_B, scaling, added = _as_one(adapters)
    bias, wider = parameters["bias"], None
    if added is not None:
        if added.dtype is not weight.dtype:
            wider, added = added, added.detach()
        bias = (added if bias is None else bias + added).to(weight.dtype)
    first = adapters[0]
    magnitude = _magnitude(layer, first)
    y = functional.lora_conv(
        x, weight, lora_A, lora_B, scaling, bias, stride=base.stride,
        padding=base.padding, dilation=base.dilation, groups=base.groups, magnitude=magnitude,
        # Of DoRA PEFT asks the layer beside the dropout.
        dropout_p=first.dropout_p, training=magnitude is None or layer.training,
    )  # fmt: skip
    return y if wider is None else with_gradient(y, wider.view(-1, *[1] * (y.dim() - 2)))


def _in_turn(layer: Any, x: Tensor, base: Any, adapters: list[Adapter]) -> Tensor:
    """DoRA active together with others: PEFT has each scale what those before it have made.

    ``z ← z + scaling · conv(conv(x, A), B)`` for each adapter, and ``z ← m / ‖W + scaling · B·A‖ ⊙ z``
    after one of DoRA; the bias is added last.
    """
    parameters = base._parameters
    weight, bias = parameters["weight"], parameters["bias"]
    first, *others = adapters
    z = functional.lora_conv(
        x, weight, first.lora_A.weight, *settled(first.lora_B.weight, first.scaling),
        stride=base.stride, padding=base.padding, dilation=base.dilation, groups=base.groups,
        magnitude=_magnitude(layer, first),
    )  # fmt: skip
    dtype, ones = z.dtype, (1,) * (z.dim() - 2)
    z = z.to(torch.promote_types(dtype, first.lora_A.weight.dtype))
    for adapter in others:
        A, B = adapter.lora_A, adapter.lora_B
        z = z + B(A(x.to(A.weight.dtype))) * adapter.scaling
        magnitude = _magnitude(layer, adapter)
        if magnitude is not None:
            with without_autocast(x):
                rows = (weight.flatten(1), A.weight.flatten(1), B.weight.flatten(1))
                norm = weight_norm(*rows, adapter.scaling)
            z = z * (magnitude.view(-1) / norm).view(-1, *ones)
    return (z if bias is None else z + bias.view(-1, *ones)).to(dtype)


def _magnitude(layer: Any, adapter: Adapter) -> Tensor | None:
    if adapter.name not in layer.lora_variant:
        return None
    magnitude: Tensor = layer.lora_magnitude_vector[adapter.name].weight
    return magnitude


def _mixed(layer: Any, x: Tensor, rows: Any) -> Tensor | None:
    """The output of a batch whose elements have adapters of their own, ``rows`` by name."""
    if conv_rules.why_stock_mixed(layer, rows, x) is not None:
        return None
    elements = by_element.elements_of(rows, list(layer._modules["lora_A"]._modules))
    adapters = {adapter.name: adapter for adapter in named(layer, elements)}
    every = list(adapters.values())
    if conv_rules.why_stock_conv(layer, every, x, of_elements=True) is not None:
        return None
    base: Any = layer._modules["base_layer"]
    y: Tensor = base(x)
    batch, N, groups = len(rows), y.shape[1], base.groups

    def shrink(name: str, own: Tensor) -> Tensor:
        lora_A = adapters[name].lora_A
        s: Tensor = lora_A(own.to(lora_A.weight.dtype))
        return s.reshape(s.shape[0], groups, s.shape[1] // groups, -1).transpose(1, 2)

    every_B = {a.name: a.lora_B.weight.flatten(1) * a.scaling for a in every}
    s = by_element.shrunk(x, elements, shrink).transpose(1, 2).flatten(0, 1)  # [batch·g, r/g, P]
    B = by_element.expanding(elements, batch, every_B).view(batch * groups, N // groups, -1)
    if groups == 1 and is_channels_last(y):
        last = y.movedim(1, -1)
        found = by_element.added(last.flatten(1, -2), s.mT, B.mT).view(last.shape).movedim(-1, 1)
    else:
        found = by_element.added(y.reshape(batch * groups, N // groups, -1), B, s).view(y.shape)
    if all(adapter.lora_B.bias is None for adapter in every):
        return found
    index = {name: i for i, name in enumerate(adapters)}
    of_element = [index.get(name, -1) for name in rows]
    return mixed.with_lora_bias(found.movedim(1, -1), every, of_element).movedim(-1, 1)


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
