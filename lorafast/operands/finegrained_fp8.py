"""The weights of checkpoints in e4m3 with a scale each block, as DeepSeek's, read where they lie.

A layer has ``weight [N, K]`` in float8_e4m3fn and ``weight_scale_inv``, float32, by which the codes are
*multiplied*: ``[⌈N / 128⌉, ⌈K / 128⌉]``, or ``[]`` for all of W. Transformers' ``FP8Linear`` is one; it
is not imported here.
"""

import sys
from typing import Any

import torch
from torch import nn

from lorafast.core.dtypes import FLOATS
from lorafast.operands.eight_bit import FP8
from lorafast.operands.operand import not_finite

_SCALE = "weight_scale_inv"
_BLOCK = (128, 128)
"""Of a layer that doesn't say."""


def weight_of(layer: nn.Module) -> FP8 | None:
    """The weight of such a layer, over its own memory; None of another layer, or of one that
    ``why_not`` has a reason against."""
    return _read(layer) if _is_one(layer) and why_not(layer) is None else None


def why_not(layer: nn.Module) -> str | None:
    """The reason for which the weight of such a layer can't be read, or None."""
    if not _is_one(layer):
        return None
    forward = type(layer).forward
    if forward is not nn.Linear.forward and forward is not _transformers_forward():
        return f"its forward is not that of Transformers' FP8Linear ({type(layer).__name__})"
    parameters, buffers = layer._parameters, layer._buffers
    held = [name for name, tensor in (parameters | buffers).items() if tensor is not None]
    own = [*(name for name in held if name not in ("weight", "bias", _SCALE)), *layer._modules]
    if own:
        return f"it has {', '.join(own)}, which a LoRALinear has no place for"
    try:
        read = _read(layer)
    except ValueError as error:
        return str(error)
    expected = [getattr(layer, "out_features", None), getattr(layer, "in_features", None)]
    if list(read.shape) != expected:
        return f"its weight has shape {list(read.shape)}, expected {expected}"
    if read.scale.is_meta:
        return "its weight is on the meta device: load it first"
    unfit = not_finite({_SCALE: read.scale})
    return None if unfit is None else "a scale of its weight is NaN or infinite"


def _is_one(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Linear) or _scale_of(layer) is None:
        return False
    weight = layer._parameters.get("weight")
    return weight is not None and weight.dtype is torch.float8_e4m3fn


def _scale_of(layer: nn.Module) -> Any:
    found = layer._parameters.get(_SCALE)
    return layer._buffers.get(_SCALE) if found is None else found


def _transformers_forward() -> object:
    module = sys.modules.get("transformers.integrations.finegrained_fp8")
    return getattr(getattr(module, "FP8Linear", None), "forward", None)


def _read(layer: Any) -> FP8:
    scale, weight = _scale_of(layer), layer._parameters["weight"]
    block = getattr(layer, "block_size", _BLOCK)
    if block is None and scale.numel() != 1:
        raise ValueError(
            f"{_SCALE} has shape {list(scale.shape)}, expected one scale: block_size is None"
        )
    if block is not None:
        block = (int(block[0]), int(block[1]))
    made = FP8({"weight": weight, _SCALE: scale}, torch.float32, block)
    bias = layer.bias
    dtype = torch.get_default_dtype() if bias is None or bias.dtype not in FLOATS else bias.dtype
    return made.to(dtype)  # type: ignore[return-value]
