"""The quantized layers that adapters are over: bitsandbytes' and torchao's.

Their weights are read over their own memory, once: what was read is kept while the tensors that it was
read from are there. ``why_not`` and ``why_not_input`` say what is left to PEFT.
"""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafast import operands
from lorafast.core.context import autocast_enabled
from lorafast.operands import Operand, bitsandbytes, torchao


class Frozen(NamedTuple):
    """A quantized layer as one product of ``x`` takes it.

    ``result``: the dtype of what the layer gives. ``apart``: ``x`` has another dtype than the product,
    so that the adapters, which go by that of ``x``, are not in one pass with it.
    """

    weight: Operand
    bias: Tensor | None
    result: torch.dtype
    apart: bool


class _Read(NamedTuple):
    key: tuple[object, ...]
    held: tuple[object, ...]
    """What the key has the ids of."""
    weight: Operand | None
    why_not: str | None
    cast: dict[torch.dtype, Operand]


_DENSE_INT8 = ("cpu", "xpu")
"""Devices on which bitsandbytes trains by W made dense."""
_reads: weakref.WeakKeyDictionary[nn.Module, _Read] = weakref.WeakKeyDictionary()


def is_one(base: nn.Module) -> bool:
    """Whether ``base`` is a layer of bitsandbytes, or an ``nn.Linear`` over a tensor of torchao's."""
    if type(base) is nn.Linear and type(base._parameters.get("weight")) is nn.Parameter:
        return False
    return of_bitsandbytes(base) or torchao.is_one(base)


def of_bitsandbytes(base: nn.Module) -> bool:
    """Whether ``base`` is a layer of bitsandbytes."""
    return bitsandbytes.is_four_bit(base) or bitsandbytes.is_eight_bit(base)


def why_not(base: nn.Module) -> str | None:
    """Why a quantized layer is left to PEFT whatever its input, as the end of a sentence, or None."""
    if torch.compiler.is_compiling():
        return "it is compiled, and its base layer's quantized weight is not a plain tensor"
    found = _read(base)
    if found.why_not is not None:
        return f"of its base layer: {found.why_not}"
    if bitsandbytes.is_eight_bit(base) and not base.training:
        return (
            "its base layer is in eval mode, where bitsandbytes multiplies in 8-bit integers and "
            "splits outliers off"
        )
    return None


def weight_of(base: nn.Module) -> Operand:
    """The weight of a layer that ``why_not`` has no reason against."""
    weight = _read(base).weight
    assert weight is not None
    return weight


def why_not_input(base: nn.Module, x: Tensor) -> str | None:
    """Why a quantized layer is left to PEFT for an input of floats, or None."""
    autocast = torch.get_autocast_dtype(x.device.type) if autocast_enabled(x) else None
    if bitsandbytes.is_eight_bit(base) and x.device.type not in _DENSE_INT8:
        return (
            f"on {x.device.type} bitsandbytes rounds the input of its int8 base layer to 8 bits, in "
            "training too"
        )
    if torchao.is_one(base):
        stored = base._parameters["weight"]
        assert stored is not None
        if torchao.kind_of(stored) == torchao.FLOATS8 and stored.dtype is not (autocast or x.dtype):
            return f"its input is {autocast or x.dtype}, its weight {stored.dtype}"
    elif bitsandbytes.is_four_bit(base) and autocast is not None and not x.is_cpu:
        compute = _compute_dtype(base, x)
        if compute is not autocast:
            return f"autocast is to {autocast}, and its base layer computes in {compute}"
    return None


def frozen(base: nn.Module, x: Tensor) -> Frozen:
    """``base`` for ``x``, against which ``why_not_input`` has no reason."""
    autocast = autocast_enabled(x)
    dtype = result = x.dtype
    if bitsandbytes.is_four_bit(base):
        if not autocast:
            dtype = _compute_dtype(base, x)
    elif autocast and _is_cast(base, x):
        result = torch.get_autocast_dtype(x.device.type)
    read = _read(base)
    weight = read.cast.get(dtype)
    if weight is None:
        weight = read.cast[dtype] = weight_of(base).to(dtype)
    bias: Tensor | None = base._parameters["bias"]
    if bias is not None and bias.dtype is not dtype:
        bias = bias.to(dtype)
    return Frozen(weight, bias, result, dtype is not x.dtype)


def forget_stale(base: nn.Module) -> None:
    """Lets go of what was read of ``base`` if it holds other tensors now, as when it was merged.

    Not in compiled code: tracing goes through the dictionary, from which layers vanish meanwhile.
    """
    if torch.compiler.is_compiling():
        return
    found = _reads.get(base)
    if found is not None and found.key != _state(base)[0]:
        del _reads[base]


def _is_cast(base: nn.Module, x: Tensor) -> bool:
    """Whether what ``base`` gives under autocast has its dtype: the integers of torchao give that of x,
    as those of bitsandbytes do where it has its own product."""
    if bitsandbytes.is_eight_bit(base):
        return x.is_cpu
    return torchao.kind_of(base._parameters["weight"]) == torchao.FLOATS8


def _compute_dtype(base: Any, x: Tensor) -> torch.dtype:
    """That of a 4-bit layer's product, which it takes from its first input if it has none."""
    if not base.compute_type_is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    dtype: torch.dtype = base.compute_dtype or x.dtype
    return dtype


def _read(base: nn.Module) -> _Read:
    key, held = _state(base)
    found = _reads.get(base)
    if found is not None and found.key == key:
        return found
    # Else what an inference mode made could not be kept for a backward.
    with torch.inference_mode(False), torch.no_grad():
        weight, reason = _read_now(base)
    found = _reads[base] = _Read(key, held, weight, reason, {})
    return found


def _read_now(base: nn.Module) -> tuple[Operand | None, str | None]:
    tensors = [t for t in _state(base)[1] if isinstance(t, Tensor)]
    if base.weight.is_meta or any(tensor.is_meta for tensor in tensors):
        return None, "it is on the meta device"
    reason = operands.why_not_of_layer(base)
    weight = None if reason is not None else operands.of_layer(base)
    if weight is None:
        return None, reason or "its weight can't be read"
    if any(tensor.is_inference() for tensor in operands.stored(weight)):
        return None, "it was made in inference mode, and can't be kept for a backward"
    try:
        _ = weight.device
    except ValueError as error:
        return None, str(error)
    return weight, None


def _state(base: Any) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """What is read of a layer, as values that are compared and as the objects that have these ids.

    A parameter of bitsandbytes may hold its layer, and is known by its address instead: what was read
    keeps the memory there.
    """
    held: tuple[object, ...]
    values: tuple[object, ...]
    weight = base._parameters["weight"]
    if bitsandbytes.is_four_bit(base):
        state = getattr(weight, "quant_state", None)
        held = (state,)
        values = (_address(weight),)
        if state is not None:
            nested = getattr(state, "state2", None)  # gone once it is repacked
            held += state.absmax, state.code, nested, getattr(state, "offset", None)
            if nested is not None:
                held += nested.absmax, nested.code
            values += (
                getattr(state, "packing_format_for_cpu", False), state.quant_type, state.blocksize,
                state.dtype, tuple(state.shape),
            )  # fmt: skip
    elif bitsandbytes.is_eight_bit(base):
        codes, scales = bitsandbytes.codes_of(base)
        held, values = (codes, scales), (base.state.has_fp16_weights,)
        if codes is not None:
            values += (_address(codes),)
    else:
        names = ("qdata", "scale", "zero_point", "act_quant_kwargs", "act_pre_scale")
        held = (weight, *(getattr(weight, name, None) for name in names))
        values = (tuple(weight.block_size or ()) if hasattr(weight, "block_size") else None,)
    return (*values, *map(id, held)), held


def _address(tensor: Tensor) -> int:
    """Without asking the tensor's class, which takes ten times as long."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.data_ptr()
