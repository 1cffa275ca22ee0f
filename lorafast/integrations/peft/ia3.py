"""(IA)³ (Liu et al., 2022): a vector scales what a layer gives or, feed-forward, what it is given."""

from typing import Any

import torch
from torch import Tensor

from lorafast.integrations.peft import low_rank
from lorafast.integrations.peft.adapters import weight_of
from lorafast.integrations.peft.low_rank import Part
from lorafast.ops.scaled import scaled
from lorafast.ops.scaled_linear import scaled_linear


def parts(layer: Any) -> list[Part]:
    """The active adapters."""
    every = low_rank.entries(layer, "ia3_l")
    return [Part(n, {"ia3_l": every[n]}) for n in low_rank.active(layer) if n in every]


def why_stock(layer: Any) -> str | None:
    """Why a layer is left to PEFT, whatever its input, as the end of a sentence, or None."""
    return _why_stock(layer, parts(layer))


def _why_stock(layer: Any, found: list[Part]) -> str | None:
    reason = low_rank.why_stock_parts(layer, found)
    if reason is not None:
        return reason
    N, K = weight_of(layer._modules["base_layer"]).shape
    shape = (1, K) if layer.is_feedforward else (N, 1)
    for part in found:
        reason = low_rank.why_not_shapes(part, ia3_l=shape)
        if reason is not None:
            return f"adapter {part.name!r} {reason}"
    return None


def forward(layer: Any, x: Tensor) -> Tensor | None:
    """``y = l ⊙ (x·Wᵀ + bias)``, feed-forward ``y = (l ⊙ x)·Wᵀ + bias``; None where PEFT serves it."""
    found = parts(layer)
    if _why_stock(layer, found) is not None:
        return None
    frozen = low_rank.frozen(layer, found, x)
    if frozen is None:
        return None
    weight, bias, result = frozen
    scale = low_rank.product(part.tensors["ia3_l"].flatten() for part in found)
    if low_rank.is_dense_like(weight, x):
        y = scaled_linear(x, weight, scale, bias, layer.is_feedforward)
    elif layer.is_feedforward:
        y = low_rank.base_linear(scaled(x, scale, fresh=False), weight, bias)
    else:
        y = scaled(low_rank.base_linear(x, weight, bias), scale)
    return y if result is None else y.to(result)


def forward_quantized(layer: Any, x: Tensor) -> Tensor | None:
    """The same over a layer of bitsandbytes: 16-bit x is float32 in PEFT, and its result."""
    found = parts(layer)
    if _why_stock(layer, found) is not None:
        return None
    # Without a device, as PEFT asks: that is whether CUDA has autocast.
    converted = _is_halved(x) and not torch.is_autocast_enabled()
    wide = x.float() if converted else x
    scale = low_rank.product(part.tensors["ia3_l"].flatten() for part in found)
    if layer.is_feedforward:
        wide = wide * scale
    frozen = low_rank.frozen(layer, found, wide)
    if frozen is None:
        return None
    weight, bias, result = frozen
    y = low_rank.base_linear(wide, weight, bias)
    y = y if result is None else y.to(result)
    if layer.is_feedforward:
        return y
    return (y * scale).to(y.dtype) if converted else y * scale


def _is_halved(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16)
