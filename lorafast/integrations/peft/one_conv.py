"""LoHa and LoKr over a convolution in float32: one with W + ΔW, where PEFT has one with each.

PEFT's own code makes ΔW, which is small beside x and y. Of the five convolutions of a training step
three are left. ΔW is rounded with W, as y is: in 16 bits it could be lost, and is left apart.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorafast.core.context import autocast_enabled
from lorafast.integrations.peft import convolved, lycoris
from lorafast.integrations.peft.low_rank import Kind, Part


def why_stock(layer: Any, parts: Sequence[Part], kind: Kind | None = None) -> str | None:
    """Why a layer is left to PEFT, whatever its input; in 16 bits it is served if it has a ``kind``."""
    reason = convolved.why_stock_parts(layer, parts)
    if reason is not None:
        return reason
    for part in parts:
        reason = lycoris.why_not_scaling(layer, part.name)
        if reason is not None:
            return f"adapter {part.name!r} {reason}"
    if _is_float32(layer, parts):
        return None
    if kind is None:
        return "its weight is not float32: a change of it would be rounded as it is"
    return convolved.why_stock(layer, kind)


def forward(
    layer: Any, x: Tensor, parts: Sequence[Part], kind: Kind | None = None
) -> Tensor | None:
    """``y = conv(x, W + Σ ΔW) + bias``; None where PEFT serves the call itself."""
    if why_stock(layer, parts, kind) is not None:
        return None
    if not _is_float32(layer, parts) or autocast_enabled(x):
        return None if kind is None else convolved.forward(layer, x, kind)
    if convolved.why_not_input(layer, parts, x) is not None:
        return None
    base: Any = layer._modules["base_layer"]
    weight = base._parameters["weight"]
    for part in parts:
        name = part.name
        if lycoris.takes_part(layer, name):
            drops = layer.training and bool(layer.rank_dropout[name])
            weight = weight + layer.get_delta_weight(name, apply_rank_dropout=drops)
    y: Tensor = base._conv_forward(x, weight, base._parameters["bias"])
    return y


def _is_float32(layer: Any, parts: Sequence[Part]) -> bool:
    """Whether W and the adapters are of this dtype."""
    weight = layer._modules["base_layer"]._parameters["weight"]
    tensors = (tensor for part in parts for tensor in part.tensors.values())
    return all(tensor.dtype is torch.float32 for tensor in (weight, *tensors))
