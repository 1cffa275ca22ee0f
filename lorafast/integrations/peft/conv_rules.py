"""Rules of convolutions: as ``rules``, which calls are left to PEFT's own forward, and why."""

from typing import Any

import torch
from peft.tuners.lora.dora import DoraConv1dLayer, DoraConv2dLayer, DoraConv3dLayer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant
from torch import Tensor, nn

from lorafast.core.context import autocast_enabled
from lorafast.integrations.peft import known, rules
from lorafast.integrations.peft.adapters import Adapter
from lorafast.nn.adaptable import why_not_windows

_CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_VARIANTS = (DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant)
_MAGNITUDES = (DoraConv1dLayer, DoraConv2dLayer, DoraConv3dLayer)
_DORA_CHANGED = known.why_changed("convolution's dora")
_MIXED_CHANGED = known.why_changed("convolution's mixed batch")
ARGUMENTS = {"adapter_names", "alora_offsets"}
"""What a call may have beside the input; PEFT passes over the offsets here."""


def why_stock_conv(
    layer: LoraLayer, adapters: list[Adapter], x: Any = None, of_elements: bool = False
) -> str | None:
    """Why a convolution of PEFT's is left to PEFT, for the input ``x`` if that is given.

    ``of_elements``: the adapters are of some elements of a mixed batch each, not of all.
    """
    base: Any = layer._modules["base_layer"]
    reason = rules.why_stock(layer, adapters) or why_not_base(base) or why_not_windows(base)
    if reason is not None:
        return reason
    if len(adapters) > 1 and not of_elements:
        reason = _why_not_together(layer, adapters, base)
        if reason is not None:
            return reason
    for adapter in adapters:
        reason = _why_not_adapter(layer, adapter, base)
        if reason is not None:
            return f"adapter {adapter.name!r} {reason}"
    return None if x is None else _why_not_input(layer, adapters, base, x)


def _why_not_together(layer: LoraLayer, adapters: list[Adapter], base: Any) -> str | None:
    if base.groups > 1:
        return "several adapters are active over a convolution in groups"
    if any(adapter.dropout_p for adapter in adapters):
        return "several adapters with dropout are active"
    if not any(adapter.name in layer.lora_variant for adapter in adapters):
        return None
    for adapter in adapters:
        if adapter.lora_B.bias is not None:
            return "several adapters are active, one of them of DoRA and one with lora_bias"
        if type(adapter.dropout) is nn.Dropout and layer.training:
            # Then PEFT scales the base layer's output alone.
            return "several adapters are active, one of them of DoRA and one with dropout"
    return None


def why_stock_mixed(layer: LoraLayer, names: Any, x: Any) -> str | None:
    """Why a mixed batch, ``names`` of its elements' adapters, is left to PEFT; ``x`` as it comes."""
    reason = _MIXED_CHANGED or rules.why_no_plain_batch(layer, names, x)
    if reason is not None:
        return reason
    for name in dict.fromkeys(names):
        dropout = layer.lora_dropout._modules.get(name)
        if type(dropout) is nn.Dropout and dropout.training:
            return f"adapter {name!r} of a mixed batch has dropout in training"
    return None


def why_not_base(base: Any) -> str | None:
    """Why a convolution that is adapted can't be read in place of calling it, or isn't known."""
    kind = type(base)
    if kind not in _CONVOLUTIONS:
        return (
            f"its base layer is a {kind.__qualname__}, not exactly an nn.Conv1d, Conv2d or Conv3d"
        )
    for method in (kind.forward, kind._conv_forward):
        if method.__module__ != "torch.nn.modules.conv" or hasattr(method, "__wrapped__"):
            return f"the forward of {kind.__qualname__} was replaced"
    reason = rules.why_not_read(base)
    return reason and f"its base layer {reason}"


def _why_not_adapter(layer: LoraLayer, adapter: Adapter, base: Any) -> str | None:
    _, lora_A, lora_B, dropout, scaling = adapter
    if type(lora_A) is not type(base) or type(lora_B) is not type(base):
        return f"is made of {type(lora_A).__qualname__} and {type(lora_B).__qualname__}"
    if type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
        return f"drops by a {type(dropout).__qualname__}"
    if type(dropout) is nn.Dropout and (dropout.inplace or type(dropout.p) not in (float, int)):
        return "has a dropout that changes its input, or has a probability of its own kind"
    if isinstance(scaling, Tensor) and scaling.dim() > 0:
        return f"has a scaling of the shape {list(scaling.shape)}"
    reason = rules.why_not_read(lora_A) or rules.why_not_read(lora_B) or rules.why_called(dropout)
    if reason is not None:
        return reason
    if lora_A._parameters["bias"] is not None:
        return "has a bias of A"
    n, r = base.weight.dim() - 2, lora_A.weight.shape[0]
    ones, zeros = (1,) * n, (0,) * n
    windows = (lora_A.stride, lora_A.padding, lora_A.dilation, lora_A.groups, lora_A.padding_mode)
    if windows != (base.stride, base.padding, ones, 1, "zeros"):
        return "has other windows for A than its base layer"
    if (lora_B.stride, lora_B.padding, lora_B.groups) != (ones, zeros, base.groups):
        return "has other windows for B than single positions"
    N, per_group, *kernel = base.weight.shape
    shapes = (r, per_group * base.groups, *kernel), (N, r // base.groups, *[1] * n)
    if (lora_A.weight.shape, lora_B.weight.shape) != shapes or r == 0 or r % base.groups:
        return f"has the shapes {list(lora_A.weight.shape)} and {list(lora_B.weight.shape)}"
    return _why_not_variant(layer, adapter, base)


def _why_not_variant(layer: LoraLayer, adapter: Adapter, base: Any) -> str | None:
    variant = layer.lora_variant.get(adapter.name)
    if variant is None:
        return None
    if type(variant) not in _VARIANTS:
        return f"is of another kind: {type(variant).__name__}"
    if _DORA_CHANGED is not None:
        return f"is of DoRA, and {_DORA_CHANGED}"
    if base.groups > 1:
        return "is of DoRA over groups, of which PEFT takes the norm of another matrix"
    if adapter.lora_B.bias is not None:
        return "is of DoRA with lora_bias"
    magnitude = layer.lora_magnitude_vector[adapter.name]
    if type(magnitude) not in _MAGNITUDES:
        return f"has a magnitude that is a {type(magnitude).__qualname__}"
    reason = rules.why_not_plain(magnitude)
    if reason is not None:
        return f"has a magnitude that {reason}"
    weight: Any = magnitude.weight
    if weight.numel() != base.weight.shape[0] or weight.device != base.weight.device:
        return "has a magnitude of another shape or device"
    return None


def why_not_input(layer: Any, adapter_dtype: torch.dtype, base: Any, x: Any) -> str | None:
    """Why a convolution with adapters of this dtype is left to PEFT for this input."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"its input is a {type(x).__name__}, not a plain tensor"
    if x.layout is not torch.strided or x.is_nested:
        return "its input is sparse or nested"
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    if x.dim() != weight.dim() or x.shape[1] != base.in_channels:
        return (
            f"its input has shape {list(x.shape)}, expected a batch of {base.in_channels} channels"
        )
    dtype = x.dtype
    if dtype not in rules.FLOATS or adapter_dtype not in (dtype, torch.float32):
        return f"its input is {dtype}, its adapters are {adapter_dtype}"
    autocast = autocast_enabled(x)
    if weight.dtype is not dtype and not autocast:
        return f"its input is {dtype}, its weight {weight.dtype}"
    if weight.dtype not in rules.FLOATS or (bias is not None and bias.dtype is not weight.dtype):
        return f"its weight is {weight.dtype}, its bias {None if bias is None else bias.dtype}"
    cast = getattr(layer, "cast_input_dtype_enabled", True)
    if adapter_dtype is not dtype and not cast and not autocast:
        return f"its input is {dtype} and must not be cast to {adapter_dtype}"
    return None


def _why_not_input(layer: LoraLayer, adapters: list[Adapter], base: Any, x: Any) -> str | None:
    adapter_dtype = adapters[0].lora_A._parameters["weight"].dtype
    reason = why_not_input(layer, adapter_dtype, base, x)
    if reason is not None:
        return reason
    weight = base._parameters["weight"]
    for adapter in adapters:
        for factor in (adapter.lora_A._parameters["weight"], adapter.lora_B._parameters["weight"]):
            if factor.dtype is not adapter_dtype:
                return (
                    f"adapter {adapter.name!r} is not {adapter_dtype} throughout, as the first one"
                )
            if factor.device != x.device or weight.device != x.device:
                return f"its input is on {x.device}, its weight or an adapter is elsewhere"
    return None
