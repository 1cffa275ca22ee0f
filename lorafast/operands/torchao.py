"""The weights that torchao's quantized tensors hold, read where they lie.

It is not imported here: whoever has a tensor of it has done so.
"""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lorafast.operands.eight_bit import FP8, EightBit, Int8
from lorafast.operands.operand import not_finite, said

FLOATS8, INTEGERS8 = "Float8Tensor", "Int8Tensor"
"""The classes of torchao that are read, by name."""


def weight_of(layer: nn.Module) -> EightBit | None:
    """The weight of an ``nn.Linear`` that is an ``Int8Tensor`` or a ``Float8Tensor``, over its own
    memory; None of another layer, or of one that ``why_not`` has a reason against."""
    if not is_one(layer) or why_not(layer) is not None:
        return None
    return _read(layer._parameters["weight"])


def is_one(layer: nn.Module) -> bool:
    """Whether ``layer`` is an ``nn.Linear`` with a tensor of torchao's as its weight."""
    if not isinstance(layer, nn.Linear):
        return False
    base = _class("torchao.utils", "TorchAOBaseTensor")
    return base is not None and isinstance(layer._parameters.get("weight"), base)


def kind_of(weight: object) -> str | None:
    """``Int8Tensor`` or ``Float8Tensor``, whichever ``weight`` is exactly; None of anything else."""
    for name in (INTEGERS8, FLOATS8):
        if type(weight) is _class("torchao.quantization", name):
            return name
    return None


def why_not(layer: nn.Module) -> str | None:
    """The reason for which the weight of an ``nn.Linear`` can't be read, though torchao made it; None
    if it can be, or torchao has not made it."""
    if not is_one(layer):
        return None
    if type(layer).forward is not nn.Linear.forward:
        return f"its forward is not that of nn.Linear ({type(layer).__name__})"
    own = [*layer._buffers, *layer._modules, *(layer._parameters.keys() - {"weight", "bias"})]
    if own:
        return f"it has {', '.join(own)}, which a LoRALinear has no place for"
    weight: Any = layer._parameters["weight"]
    kind = kind_of(weight)
    if kind is None:
        return (
            f"its weight is torchao's {type(weight).__name__}, expected {INTEGERS8} or {FLOATS8}, as "
            "its weight-only int8 and float8 make"
        )
    return _why_not_weight_only(weight) or _why_not_read(kind, weight)


def _why_not_weight_only(weight: Any) -> str | None:
    if weight.act_quant_kwargs is not None:
        return "torchao quantizes its input too (act_quant_kwargs), expected its weight-only kinds"
    if getattr(weight, "act_pre_scale", None) is not None:
        return "torchao scales its input (act_pre_scale), which a LoRALinear doesn't"
    return None


def _why_not_read(kind: str, weight: Any) -> str | None:
    for name in ("qdata", "scale"):
        part = getattr(weight, name, None)
        if not isinstance(part, Tensor):
            return f"its weight's {name} is {said(part)}, expected a tensor"
    zero = getattr(weight, "zero_point", None)
    if kind == INTEGERS8 and zero is not None and bool(zero.count_nonzero()):
        return "its codes have zero points, expected symmetric ones"
    try:
        read = _read(weight)
    except ValueError as error:
        return str(error)
    unfit = not_finite({"scale": read.scale})
    return None if unfit is None else "a scale of its weight is NaN or infinite"


def _read(weight: Any) -> EightBit:
    codes, scale = weight.qdata, weight.scale
    if codes.dim() != 2:
        raise ValueError(f"weight has shape {list(codes.shape)}, expected [N, K]")
    (N, K), block = codes.shape, _block(weight)
    make: Callable[..., EightBit] = Int8 if kind_of(weight) == INTEGERS8 else FP8
    # A scale of all of W, or of each row, is known by its shape.
    whole = block in ((N, K), (1, K))
    return make({"weight": codes, "scale": scale}, weight.dtype, None if whole else block)


def _block(weight: Any) -> tuple[int, int]:
    sizes = weight.block_size
    N, K = weight.qdata.shape
    if not sizes and weight.scale.numel() == 1:
        return N, K
    if len(sizes or ()) != 2:
        raise ValueError(f"weight has blocks of {sizes}, expected rows and columns")
    rows, columns = map(int, sizes)
    if min(rows, columns) < 1 or N % rows or K % columns:
        raise ValueError(f"weight has blocks of {rows} x {columns}, which don't divide {N} x {K}")
    if (rows, columns) == (1, K) and weight.scale.shape != (N, 1):
        raise ValueError(f"scale has shape {list(weight.scale.shape)}, expected [{N}, 1], of rows")
    if (rows, columns) == (N, K) != (1, K) and weight.scale.numel() != 1:
        raise ValueError(f"scale has shape {list(weight.scale.shape)}, expected one for {N} x {K}")
    return rows, columns


def _class(module: str, name: str) -> type | None:
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None
