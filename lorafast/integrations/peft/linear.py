"""LoRA over a linear layer: which of PEFT's calls are served fast, and how."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafast import functional
from lorafast.core.context import autocast_enabled
from lorafast.integrations.peft import (
    alora,
    dora,
    mixed,
    quantized,
    rules,
    variants,
    velora,
)
from lorafast.integrations.peft.adapters import Adapter, active, settled, weight_of, with_gradient
from lorafast.integrations.peft.quantized import Frozen
from lorafast.operands import Operand, Weight
from lorafast.ops.dora_linear import frozen_linear


def forward(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The layer's output, or None where PEFT serves the call itself."""
    if args:
        return None
    offsets = None
    if kwargs:
        if "adapter_names" in kwargs:
            return mixed.forward(layer, x, kwargs)
        if kwargs.keys() != {"alora_offsets"}:
            return None
        offsets = kwargs["alora_offsets"]
    adapters = active(layer)
    if rules.why_stock_linear(layer, adapters) is not None:
        return None
    base = layer._modules["base_layer"]
    weight, bias = weight_of(base), base._parameters["bias"]
    if rules.why_stock_input(layer, adapters, weight, x) is not None:
        return None
    if layer.lora_variant and rules.why_stock_alora(layer, adapters, x, offsets) is not None:
        return None
    if not isinstance(weight, Operand):
        return _one_pass(layer, x, weight, adapters, bias, offsets)
    frozen = quantized.frozen(base, x)
    if rules.why_stock_apart(layer, adapters, frozen) is not None:
        return None
    if frozen.apart:
        return _apart(layer, x, frozen, adapters, offsets)
    y = _one_pass(layer, x, frozen.weight, adapters, frozen.bias, offsets)
    return y.to(frozen.result)


def _one_pass(
    layer: Any,
    x: Tensor,
    weight: Weight,
    adapters: list[Adapter],
    bias: Tensor | None,
    offsets: Sequence[Any] | None,
) -> Tensor:
    if not layer.lora_variant:
        return lora_linear(x, weight, adapters, bias)
    first, found = adapters[0], variants.plain(layer, adapters)
    if any(rules.is_alora(layer, adapter.name) for adapter in adapters):
        return _activated(layer, x, weight, found, bias, offsets)
    if len(adapters) == 1 and rules.is_dora(layer, first.name):
        magnitude = layer.lora_magnitude_vector[first.name].weight
        return dora.dora_linear(x, weight, first, magnitude, bias, layer.training)
    own = [adapter for adapter in adapters if variants.is_velora(layer, adapter.name)]
    dropped = any(adapter.dropout_p for adapter in own)
    if dropped or any(rules.is_dora(layer, adapter.name) for adapter in adapters):
        return _in_turn(layer, x, weight, adapters, found, bias)
    y = lora_linear(x, weight, found, bias)
    for adapter in own:
        y = velora.with_gradient(layer, y, x, adapter)
    return y


def _in_turn(
    layer: Any,
    x: Tensor,
    weight: Weight,
    adapters: list[Adapter],
    plain: list[Adapter],
    bias: Tensor | None,
) -> Tensor:
    """The layer where DoRA is active together with others, or VeLoRA drops elements.

    One after another, as PEFT has them: DoRA scales what those before it have made too, unless it drops
    elements. ``plain``: what stands in for each adapter. All but the base layer, or the first DoRA over
    it, is PyTorch's own calls, in the widest dtype; the sum is rounded once.
    """
    first, done = adapters[0], 0
    drops = layer.training and type(first.dropout) is not nn.Identity
    if rules.is_dora(layer, first.name) and not drops and not _wider(plain, weight):
        magnitude = layer.lora_magnitude_vector[first.name].weight
        found, done = dora.dora_linear(x, weight, first, magnitude, bias, layer.training), 1
    else:
        found = _base(x, weight, bias)
    dtype = found.dtype
    for adapter, (_, A, B, dropout, s) in zip(adapters[done:], plain[done:], strict=True):
        left = x.to(A.weight.dtype)
        if not rules.is_dora(layer, adapter.name):
            left = dropout(left)
            found = found + B(A(left)) * s
            if variants.is_velora(layer, adapter.name):
                found = velora.with_gradient(layer, found, left, adapter)
            continue
        scale = dora.scale_of(weight, adapter, layer.lora_magnitude_vector[adapter.name].weight)
        if layer.training and type(dropout) is not nn.Identity:
            left = dropout(left)
            product = _base_of(left, x, weight)
        else:
            product = found if bias is None else found - bias
        found = found + (scale - 1) * product + scale * B(A(left)) * s
    return found.to(dtype)


def _base_of(left: Tensor, x: Tensor, weight: Weight) -> Tensor:
    """``left·Wᵀ``, in the dtype of ``x``; of float16 in that of ``left``, for it need not fit."""
    if x.dtype is torch.float16 and not autocast_enabled(x):
        return _base(left, weight.to(left.dtype), None)
    return _base(left.to(x.dtype), weight, None)


def _activated(
    layer: Any,
    x: Tensor,
    weight: Weight,
    adapters: list[Adapter],
    bias: Tensor | None,
    offsets: Sequence[Any] | None,
) -> Tensor:
    """The layer of which some adapters are aLoRA: over the last tokens of each sequence alone.

    The grouped operation has no dropout, and one adapter a row: else those rows are added apart.
    """
    counts, T = alora.counts_of(offsets, x), alora.tokens_of(x)
    if all(count == T for count in counts):
        return lora_linear(x, weight, adapters, bias)
    own, others = _by_kind(layer, adapters)
    wider = _wider(adapters, weight)
    if others and not wider:
        return alora.added(lora_linear(x, weight, others, bias), x, own, counts)
    has_bias = any(adapter.lora_B._parameters["bias"] is not None for adapter in own)
    if others or any(adapter.dropout_p for adapter in own) or (wider and has_bias):
        y = _base(x, weight, bias)
        return alora.added(_added(y, x, others), x, own, counts).to(y.dtype)
    assignment = alora.assigned((0,) * len(counts), counts, x)
    lora_A, lora_B, scaling, added = _as_one(own[0], own[1:])
    y = functional.grouped_lora_linear(
        x, weight, lora_A.unsqueeze(0), lora_B.unsqueeze(0), scaling, assignment, bias
    )
    return y if added is None else alora.with_bias(y, added, assignment)


def _by_kind(layer: Any, adapters: list[Adapter]) -> tuple[list[Adapter], list[Adapter]]:
    """Those of aLoRA, and the others."""
    own = [adapter for adapter in adapters if rules.is_alora(layer, adapter.name)]
    return own, [adapter for adapter in adapters if adapter not in own]


def _apart(
    layer: Any, x: Tensor, frozen: Frozen, adapters: list[Adapter], offsets: Sequence[Any] | None
) -> Tensor:
    """The base layer in the dtype that it computes in, the adapters in theirs, as PEFT has them."""
    y = frozen_linear(x.to(frozen.weight.dtype), frozen.weight, frozen.bias).to(x.dtype)
    own, others = _by_kind(layer, variants.plain(layer, adapters))
    found = _added(y, x, others)
    if own:
        found = alora.added(found, x, own, alora.counts_of(offsets, x))
    return found.to(y.dtype)


def _added(y: Tensor, x: Tensor, adapters: list[Adapter]) -> Tensor:
    """``y`` and what each of some adapters makes of ``x``, by PyTorch's own calls.

    In the dtype of the widest, as PEFT sums them: the caller rounds it, once.
    """
    for _, A, B, dropout, s in adapters:
        y = y + B(A(dropout(x.to(A.weight.dtype)))) * s
    return y


def _base(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    if isinstance(weight, Operand):
        return functional.quantized_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _wider(adapters: list[Adapter], weight: Weight) -> bool:
    """Whether adapters are of a wider dtype than the weight: of one that is not its own."""
    dtype = weight.dtype
    return any(adapter.lora_A._parameters["weight"].dtype is not dtype for adapter in adapters)


def lora_linear(x: Tensor, weight: Weight, adapters: list[Adapter], bias: Tensor | None) -> Tensor:
    """``x·Wᵀ + Σ scaling · (drop(x)·Aᵀ)·Bᵀ + bias`` in one pass.

    Several adapters are one: A's stacked, B's side by side. Where each drops elements of its own, the
    first one is in the pass and the others are added to it; wider ones than the weight are added to
    the base layer, so that their sum is rounded once.
    """
    first, *others = adapters
    dropout_p = first.dropout_p
    apart = []
    if others and any(adapter.dropout_p for adapter in adapters):
        if _wider(adapters, weight):
            y = _base(x, weight, bias)
            return _added(y, x, adapters).to(y.dtype)
        apart, others = others, []
    lora_A, lora_B, scaling, added = _as_one(first, others)
    wider = None
    if added is not None:
        if added.dtype is not weight.dtype:
            wider, added = added, added.detach()
        bias = (added if bias is None else bias + added).to(weight.dtype)
    y = functional.lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p=dropout_p)
    if wider is not None:
        y = with_gradient(y, wider)
    return _added(y, x, apart).to(y.dtype) if apart else y


def _as_one(first: Adapter, others: list[Adapter]) -> tuple[Tensor, Tensor, float, Tensor | None]:
    """A, B, scaling and what is added to the bias, for the sum of adapters."""
    lora_A: Any = first.lora_A._parameters["weight"]
    lora_B: Any = first.lora_B._parameters["weight"]
    bias = first.lora_B._parameters["bias"]
    added = None if bias is None else bias * first.scaling
    if not others:
        if torch.compiler.is_compiling() and not isinstance(first.scaling, Tensor):
            return lora_A, lora_B, first.scaling, added  # which lora_linear folds into B, unrounded
        return lora_A, *settled(lora_B, first.scaling), added
    every_A, every_B = [lora_A], [lora_B * first.scaling]
    for other in others:
        every_A.append(other.lora_A.weight)
        every_B.append(other.lora_B.weight * other.scaling)
        if other.lora_B.bias is not None:
            more = other.lora_B.bias * other.scaling
            added = more if added is None else added + more
    return torch.cat(every_A), torch.cat(every_B, 1), 1.0, added
