"""The weights that layers of bitsandbytes hold, read where they lie.

It is not imported here: whoever has a layer of it has done so.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from lorafast.operands.eight_bit import WHO_CASTS, Int8
from lorafast.operands.four_bit import FP4, NF4, FourBit
from lorafast.operands.operand import not_finite, said

_FOUR_BIT: dict[str, type[FourBit]] = {"nf4": NF4, "fp4": FP4}


def weight_of(layer: nn.Module) -> FourBit | Int8 | None:
    """The weight of a ``Linear4bit`` or ``Linear8bitLt``, over the layer's own memory; None of another
    layer, or of one that ``why_not`` has a reason against."""
    if not (is_four_bit(layer) or is_eight_bit(layer)) or why_not(layer) is not None:
        return None
    return _four_bit(layer) if is_four_bit(layer) else _int8(layer)


def is_four_bit(layer: nn.Module) -> bool:
    """Whether ``layer`` is a ``Linear4bit``."""
    return _is(layer, "Linear4bit")


def is_eight_bit(layer: nn.Module) -> bool:
    """Whether ``layer`` is a ``Linear8bitLt``."""
    return _is(layer, "Linear8bitLt")


def why_not(layer: nn.Module) -> str | None:
    """The reason for which the weight of a layer of bitsandbytes can't be read, or None."""
    for name, ask in (("Linear4bit", _why_not_four_bit), ("Linear8bitLt", _why_not_int8)):
        if _is(layer, name):
            return _why_not_stock(layer, name) or ask(layer)
    return None


def check_codes(layer: Any) -> None:
    """Raises ``ValueError`` if the weight of a ``Linear4bit`` was cast, as FSDP's policy does with codes
    that are stored as floats."""
    if not is_four_bit(layer):
        return
    weight, stored = layer._parameters["weight"], layer.quant_storage
    state = getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)
    if state is None or hasattr(weight, "full_tensor"):  # a DTensor, which has another's shape
        return
    N, K = state.shape
    held, expected = weight.numel() * weight.itemsize, (N * K + 1) // 2
    as_other = weight.is_floating_point() and stored.is_floating_point and weight.dtype != stored
    if held != expected or as_other:
        raise ValueError(
            f"weight is {weight.dtype} of {held} bytes, expected {expected} of 4-bit codes stored as "
            f"{stored}{WHO_CASTS}, or store the codes as uint8 or in that dtype "
            "(bnb_4bit_quant_storage)"
        )


def _why_not_stock(layer: nn.Module, name: str) -> str | None:
    if type(layer).forward is not getattr(sys.modules["bitsandbytes.nn"], name).forward:
        return f"its forward is not that of bitsandbytes' {name} ({type(layer).__name__})"
    own = [*layer._buffers, *layer._modules]
    return f"it has {', '.join(own)}, which a LoRALinear has no place for" if own else None


def _is(layer: nn.Module, name: str) -> bool:
    kind = getattr(sys.modules.get("bitsandbytes.nn"), name, None)
    return isinstance(kind, type) and isinstance(layer, kind)


_NOT_YET = (
    "bitsandbytes has not quantized its weight yet: it does when the layer is moved to a device"
)


def _why_not_four_bit(layer: Any) -> str | None:
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return _NOT_YET
    if getattr(state, "packing_format_for_cpu", False):
        return (
            "bitsandbytes has repacked its weight for inference on this CPU, which rounds the scales: "
            "take it before its first call in eval mode"
        )
    if state.quant_type not in _FOUR_BIT:
        return f"its quant_type is {state.quant_type!r}, expected {' or '.join(_FOUR_BIT)}"
    reason = _why_not_whole(state)
    if reason is not None:
        return reason
    expected = (layer.out_features, layer.in_features)
    if tuple(state.shape) != expected:
        return f"its weight was quantized as {list(state.shape)}, expected {list(expected)}"
    numbers = torch.tensor(_FOUR_BIT[state.quant_type].numbers, dtype=torch.float32, device="cpu")
    if not torch.equal(state.code.cpu().float(), numbers):
        return f"its quant_map is not that of {state.quant_type}"
    unfit = not_finite(_scales_of(state))
    if unfit is not None:
        return f"a scale of its weight is NaN or infinite (quant_state.{unfit})"
    try:
        _four_bit(layer)
    except ValueError as error:
        return str(error)
    return None


def _scales_of(state: Any) -> dict[str, Any]:
    """What a quant_state makes scales of, by the names it has there."""
    if state.state2 is None:
        return {"absmax": state.absmax}
    return {
        "absmax": state.absmax, "offset": state.offset, "state2.absmax": state.state2.absmax,
        "state2.code": state.state2.code,
    }  # fmt: skip


def _why_not_whole(state: Any) -> str | None:
    """What a quant_state lacks, or None."""
    for name, part in {"code": state.code, **_scales_of(state)}.items():
        if not isinstance(part, Tensor):
            return f"its quant_state.{name} is {said(part)}, expected a tensor"
        if part.is_meta:
            return f"its quant_state.{name} is on the meta device: load it first"
    if not isinstance(state.shape, list | tuple):
        return f"its quant_state.shape is {said(state.shape)}, expected two sizes"
    if state.state2 is not None and type(state.state2.blocksize) is not int:
        return (
            f"its quant_state.state2.blocksize is {said(state.state2.blocksize)}, expected an int"
        )
    return None


def _four_bit(layer: Any) -> FourBit:
    state = layer.weight.quant_state
    tensors = {"weight": _plain(layer.weight), "absmax": state.absmax}
    nested = None
    if state.state2 is not None:
        nested = state.state2.blocksize
        tensors |= {
            "nested_absmax": state.state2.absmax, "nested_quant_map": state.state2.code,
            "nested_offset": state.offset,
        }  # fmt: skip
    N, K = state.shape
    return _FOUR_BIT[state.quant_type](tensors, (N, K), state.dtype, state.blocksize, nested)


def _why_not_int8(layer: Any) -> str | None:
    if layer.state.has_fp16_weights:
        return "its has_fp16_weights is True: it trains a 16-bit weight, which is quantized in each call"
    parts = dict(zip(("CB", "SCB"), codes_of(layer), strict=True))
    if all(part is None for part in parts.values()):
        return _NOT_YET
    for name, part in parts.items():
        if not isinstance(part, Tensor):
            return f"its {name} is {said(part)}, expected a tensor"
        if part.is_meta:
            return f"its {name} is on the meta device: load it first"
    if not_finite({"SCB": parts["SCB"]}) is not None:  # type: ignore[dict-item]
        return "a scale of its weight is NaN or infinite (SCB)"
    return _why_not_sized(layer, parts["CB"], parts["SCB"])  # type: ignore[arg-type]


def _why_not_sized(layer: Any, codes: Tensor, scales: Tensor) -> str | None:
    """What codes and scales are that are not those of a weight ``[out_features, in_features]``."""
    expected = (layer.out_features, layer.in_features)
    if tuple(codes.shape) != expected:
        return f"its CB has shape {list(codes.shape)}, expected {list(expected)}"
    if scales.numel() != expected[0]:  # Int8 takes one scale of all of W too
        return f"its SCB has shape {list(scales.shape)}, expected [{expected[0]}], a scale each row"
    try:
        _int8(layer)
    except ValueError as error:
        return str(error)
    return None


def _int8(layer: Any) -> Int8:
    codes, scales = codes_of(layer)
    assert codes is not None
    assert scales is not None
    dtype = torch.get_default_dtype() if layer.bias is None else layer.bias.dtype
    made = Int8({"weight": _plain(codes), "SCB": scales}, torch.float32)
    return made.to(dtype)  # type: ignore[return-value]


def codes_of(layer: Any) -> tuple[Tensor | None, Tensor | None]:
    """Codes and scales of a ``Linear8bitLt``, moved to its state by its first call."""
    found = layer.weight if getattr(layer.weight, "CB", None) is not None else layer.state
    return getattr(found, "CB", None), getattr(found, "SCB", None)


def _plain(tensor: Tensor) -> Tensor:
    """The same memory, without a class of its own."""
    return tensor.detach().as_subclass(Tensor)
