"""Rules of attention: as ``rules``, which calls are left to PEFT's own forward, and why."""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import nn

from lorafast.core.context import autocast_enabled
from lorafast.integrations.peft import rules
from lorafast.integrations.peft.adapters import Adapter, active
from lorafast.nn.attention import Heads, why_not_inputs


def why_stock_attention(layer: LoraLayer, adapters: list[Adapter]) -> str | None:
    """Why an attention of PEFT's is left to PEFT, whatever its inputs."""
    reason = rules.why_stock(layer, adapters)
    if reason is not None:
        return reason
    base: Any = layer._modules["base_layer"]
    reason = _why_not_base(base)
    if reason is not None:
        return reason
    if len(adapters) > 1:
        return "several adapters are active, of which PEFT adds all and trains the last"
    (first,) = adapters
    out = base._modules["out_proj"]
    if not isinstance(out, Linear) or out._disable_adapters or out.merged_adapters:
        return "its out_proj is no lora.Linear, or one that is disabled or merged"
    others = active(out)
    if out._active_adapter != layer._active_adapter or len(others) != 1:
        return "its out_proj has other active adapters"
    reason = _why_not_out_proj(out._modules["base_layer"])
    if reason is not None:
        return f"its out_proj {reason}"
    for one, adapter in ((layer, first), (out, others[0])):
        if adapter.name in one.lora_variant:
            return f"adapter {adapter.name!r} is of another kind than plain LoRA"
        reason = rules.why_not_adapter(adapter)
        if reason is not None:
            return reason
        if adapter.lora_B._parameters["bias"] is not None:
            return f"adapter {adapter.name!r} has a bias of B, which PEFT adds to out_proj alone"
    return _why_not_factors(base, first, others[0])


def _why_not_base(base: Any) -> str | None:
    kind = type(base)
    if kind is not nn.MultiheadAttention:
        return f"its base layer is a {kind.__qualname__}, not exactly an nn.MultiheadAttention"
    forward = kind.forward
    if forward.__module__ != "torch.nn.modules.activation" or hasattr(forward, "__wrapped__"):
        return "the forward of nn.MultiheadAttention was replaced"
    weights = (base._parameters.get("in_proj_weight"), base._parameters.get("in_proj_bias"))
    if weights[0] is None or "in_proj_bias" not in base._parameters:
        return "its base layer has no in_proj_weight or in_proj_bias of its own"
    others = (base.bias_k, base.bias_v)
    for tensor in (*weights, *others):
        if tensor is not None and (type(tensor) not in rules.PLAIN or tensor.is_meta):
            return f"its base layer has a {type(tensor).__name__} or values on meta"
    reason = rules.why_called(base)
    return reason and f"its base layer {reason}"


def _why_not_out_proj(plain: nn.Module) -> str | None:
    if not isinstance(plain, nn.Linear) or type(plain).forward is not nn.Linear.forward:
        return f"is a {type(plain).__qualname__}"
    return rules.why_not_read(plain)


def _why_not_factors(base: Any, first: Adapter, other: Adapter) -> str | None:
    E, dtype = base.embed_dim, first.lora_A.weight.dtype
    weight = base._parameters["in_proj_weight"]
    out = base._modules["out_proj"]._modules["base_layer"]
    if weight.shape != (3 * E, E) or out.weight.shape != (E, E):
        return f"its weights have the shapes {list(weight.shape)} and {list(out.weight.shape)}"
    if weight.requires_grad or out.weight.requires_grad:
        return "its weights are trained, which PEFT's merge cuts off"
    for adapter, rows in ((first, 3 * E), (other, E)):
        A, B = adapter.lora_A.weight, adapter.lora_B.weight
        r = A.shape[0]
        if A.shape != (r, E) or B.shape != (rows, r) or r == 0:
            return f"adapter {adapter.name!r} has the shapes {list(A.shape)} and {list(B.shape)}"
        if (
            A.dtype is not dtype
            or B.dtype is not dtype
            or not A.device == B.device == weight.device
        ):
            return f"adapter {adapter.name!r} is not {dtype} on {weight.device} throughout"
    bias = base._parameters["in_proj_bias"]
    for tensor in (out.weight, bias, out.bias):
        if tensor is not None and (tensor.dtype, tensor.device) != (weight.dtype, weight.device):
            return f"its weights and biases are not {weight.dtype} on {weight.device} throughout"
    if weight.dtype not in rules.FLOATS or dtype not in (weight.dtype, torch.float32):
        return f"its weight is {weight.dtype}, its adapters are {dtype}"
    return None


def why_stock_input(
    layer: LoraLayer, adapter: Adapter, heads: Heads, query: Any, given: dict[str, Any]
) -> str | None:
    """Why an attention is left to PEFT for these inputs; ``given``: all but the query, by name."""
    weight: Any = layer._modules["base_layer"]._parameters["in_proj_weight"]
    inputs = (query, given["key"], given["value"])
    masks = (given.get("key_padding_mask"), given.get("attn_mask"))
    for x in (*inputs, *(mask for mask in masks if mask is not None)):
        if type(x) not in rules.PLAIN or x.layout is not torch.strided:
            return f"an input is a {type(x).__name__}, not a plain tensor"
    autocast = autocast_enabled(query)
    for x in inputs:
        if x.device != weight.device:
            return f"an input is on {x.device}, its weight on {weight.device}"
        if x.dtype is not query.dtype or x.dtype not in rules.FLOATS:
            return f"an input is {x.dtype}"
        if x.dtype is not weight.dtype and not autocast:
            return f"an input is {x.dtype}, its weight {weight.dtype}"
    causal = bool(given.get("is_causal", False))
    return why_not_inputs(*inputs, *masks, causal, weight.shape[1], heads)
