"""State dicts of bitsandbytes' layers: what keys an operand's tensors have there, and what they say.

A 4-bit layer has ``weight [⌈N·K / 2⌉, 1]``, ``weight.absmax``, ``weight.quant_map``, of nested scales
``weight.nested_absmax`` and ``weight.nested_quant_map``, and ``weight.quant_state.bitsandbytes__nf4``:
JSON as bytes, of the shape, the dtype, the block sizes and the nested offset. An int8 layer has
``weight [N, K]``, ``SCB [N]`` and ``weight_format``, which is 0: by rows.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorafast.core.codebooks import codebook
from lorafast.core.problem import PLAIN
from lorafast.operands.eight_bit import Int8
from lorafast.operands.four_bit import FP4, NF4, FourBit, shortened
from lorafast.operands.operand import Operand, check_finite

_KINDS: dict[str, type[FourBit]] = {"nf4": NF4, "fp4": FP4}
_PACKED = "weight.quant_state.bitsandbytes__"
_MOST_BYTES = 1 << 16
"""Of the JSON; that of a layer takes some 200."""
_MOST_TEXT = 80
_MOST_SIZE = 2**63
_MOST_OFFSET = torch.finfo(torch.float32).max
_FOUR_BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def to_state(weight: Operand) -> dict[str, Tensor] | None:
    """Under which keys bitsandbytes has the tensors of ``weight``; None if it has no such layers, or a
    tensor is none of PyTorch's own (sharded, say)."""
    tensors = weight.tensors()
    if not all(type(tensor) in PLAIN for tensor in tensors.values()):
        return None
    if isinstance(weight, FourBit):
        return _of_four_bit(weight)
    if isinstance(weight, Int8) and "SCB" in tensors:
        return {**tensors, "weight_format": torch.zeros((), dtype=torch.uint8)}
    return None


def _of_four_bit(weight: FourBit) -> dict[str, Tensor] | None:
    tensors, kind = weight.tensors(), weight.format
    if _KINDS.get(kind) is not type(weight):
        return None
    said: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": weight.block,
        "dtype": str(weight.stored_dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    state = {
        "weight": tensors["weight"].reshape(-1, 1),
        "weight.absmax": tensors["absmax"].reshape(-1),
        "weight.quant_map": codebook(weight.numbers, tensors["absmax"]).clone(),
    }
    if weight.nested_block is not None:
        if tensors["nested_offset"].is_meta:  # whose value is in the JSON
            return None
        said |= {
            "nested_blocksize": weight.nested_block,
            "nested_dtype": "float32",
            "nested_offset": tensors["nested_offset"].item(),
        }
        state["weight.nested_absmax"] = tensors["nested_absmax"].reshape(-1)
        state["weight.nested_quant_map"] = tensors["nested_quant_map"].reshape(-1)
    text = json.dumps(said).encode()
    state[_PACKED + kind] = torch.tensor(list(text), dtype=torch.uint8, device="cpu")
    return state


def is_of_layer(keys: Mapping[str, Any]) -> bool:
    """Whether a layer's state is that of bitsandbytes' 4-bit or int8 layer."""
    return any(key.startswith("weight.") for key in keys) or "SCB" in keys


def keys_of(keys: Mapping[str, Any]) -> set[str]:
    """Which of a layer's keys are of its weight, stored as bitsandbytes does."""
    own = {"weight", "SCB", "weight_format"}
    return {key for key in keys if key in own or key.startswith("weight.")}


def from_state(state: Mapping[str, Tensor]) -> FourBit | Int8:
    """The weight that a layer's state has; its keys are as the layer names them.

    Nothing is allocated by what the state says of sizes: they must be those of its tensors.

    Raises:
        ValueError: it has no weight, or one that doesn't fit; the message says what.
    """
    if "weight" not in state:
        raise ValueError("the state has no weight")
    for name in keys_of(state):
        if not isinstance(state[name], Tensor):
            raise ValueError(f"{name} is a {type(state[name]).__name__}, expected a tensor")
    if any(key.startswith("weight.") for key in state):
        return _four_bit_from(state)
    return _int8_from(state)


def _int8_from(state: Mapping[str, Tensor]) -> Int8:
    if "SCB" not in state:
        raise ValueError("the state has no SCB, the scales of its weight")
    layout = state.get("weight_format")
    if layout is not None and not layout.is_meta and (layout.numel() != 1 or layout.item() != 0):
        given = layout.item() if layout.numel() == 1 else f"{layout.dtype} {list(layout.shape)}"
        raise ValueError(f"weight_format is {given}, expected 0: by rows")
    weight = Int8({"weight": state["weight"], "SCB": state["SCB"]}, torch.float32)
    check_finite({"SCB": state["SCB"]})
    return weight


def _four_bit_from(state: Mapping[str, Tensor]) -> FourBit:
    kind, said = _said(state)
    for name in ("absmax", "quant_map"):
        if f"weight.{name}" not in state:
            raise ValueError(f"the state has no weight.{name}")
    others = {key for key in keys_of(state) if "." in key} - {
        f"weight.{name}" for name in _FOUR_BIT
    }
    if others != {_PACKED + kind}:
        raise ValueError(f"the state has {', '.join(sorted(others - {_PACKED + kind}))} besides")
    numbers = torch.tensor(_KINDS[kind].numbers, dtype=torch.float32, device="cpu")
    given = state["weight.quant_map"]
    if not given.is_meta and not torch.equal(given.reshape(-1).cpu().float(), numbers):
        raise ValueError(f"weight.quant_map is not that of {kind}")
    codes = state["weight"]
    if not codes.is_contiguous():
        raise ValueError(f"weight has strides {codes.stride()}, expected contiguous")
    tensors = {"weight": codes, "absmax": state["weight.absmax"]}
    nested = _nested_from(state, said)
    tensors |= nested
    (N, K), block = _sizes(said), _integer(said, "blocksize")
    dtype = getattr(torch, str(said.get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype is {_text(said.get('dtype'))}, expected the name of a dtype")
    nested_block = _integer(said, "nested_blocksize") if nested else None
    weight = _KINDS[kind](tensors, (N, K), dtype, block, nested_block)
    check_finite({name: tensor for name, tensor in tensors.items() if name != "weight"})
    return weight


def _nested_from(state: Mapping[str, Tensor], said: Mapping[str, Any]) -> dict[str, Tensor]:
    """What nested scales are made of; empty if they aren't."""
    in_state = [f"weight.{name}" for name in _FOUR_BIT[2:]]
    in_json = ["nested_blocksize", "nested_dtype", "nested_offset"]
    there = [name for name in in_state if name in state] + [n for n in in_json if n in said]
    if not there:
        return {}
    missing = [name for name in (*in_state, *in_json) if name not in there]
    if missing:
        raise ValueError(f"the state has {there[0]}, and no {missing[0]}: nested scales need both")
    offset = said["nested_offset"]
    if isinstance(offset, bool) or not isinstance(offset, int | float):
        raise ValueError(f"nested_offset is {_text(offset)}, expected a finite float32")
    if not abs(offset) <= _MOST_OFFSET:  # NaN neither
        given = shortened(offset) if isinstance(offset, int) else offset
        raise ValueError(f"nested_offset is {given}, expected a finite float32")
    if said["nested_dtype"] != "float32":
        raise ValueError(f"nested_dtype is {_text(said['nested_dtype'])}, expected 'float32'")
    absmax, numbers = (state[name] for name in in_state)
    made = torch.tensor(float(offset), dtype=torch.float32, device=absmax.device)
    return {"nested_absmax": absmax, "nested_quant_map": numbers, "nested_offset": made}


def _said(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """The quant_type, and what the JSON says."""
    packed = [key for key in state if key.startswith("weight.quant_state.")]
    if len(packed) != 1:
        found = ", ".join(packed) or "no weight.quant_state"
        raise ValueError(f"the state has {found}, expected one of {_expected()}")
    kind = packed[0].removeprefix(_PACKED)
    if kind not in _KINDS:
        raise ValueError(f"the state has {packed[0]}, expected one of {_expected()}")
    text = state[packed[0]]
    if text.dtype is not torch.uint8 or text.numel() > _MOST_BYTES or text.is_meta:
        raise ValueError(
            f"{packed[0]} is {text.dtype} of {text.numel()} elements, expected JSON as bytes"
        )
    try:
        said = json.loads(bytes(text.reshape(-1).tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{packed[0]} is no JSON: {type(error).__name__}") from error
    if not isinstance(said, dict) or said.get("quant_type") != kind:
        given = said.get("quant_type") if isinstance(said, dict) else said
        raise ValueError(f"quant_type is {_text(given)}, expected {kind!r}, as {packed[0]} says")
    return kind, said


def _expected() -> str:
    return " or ".join(_PACKED + kind for kind in _KINDS)


def _text(value: object) -> str:
    """What a JSON says, in some words of a message."""
    try:
        said = repr(value)
    except ValueError:  # Python writes no integers of thousands of digits
        return f"a {type(value).__name__}"
    return said if len(said) <= _MOST_TEXT else f"{said[:_MOST_TEXT]}..."


def _sizes(said: Mapping[str, Any]) -> tuple[int, int]:
    shape = said.get("shape")
    whole = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not isinstance(shape, list) or not whole or len(shape) != 2:
        raise ValueError(f"shape is {_text(shape)}, expected [out_features, in_features]")
    if max(shape) >= _MOST_SIZE:
        sizes = " x ".join(map(shortened, shape))
        raise ValueError(f"shape is {sizes}, expected sizes below 2^63")
    return shape[0], shape[1]


def _integer(said: Mapping[str, Any], name: str) -> int:
    value = said.get(name)
    if type(value) is not int:
        raise ValueError(f"{name} is {_text(value)}, expected an integer")
    return value
