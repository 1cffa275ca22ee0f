"""How a frozen weight is stored: one file a format, and the products with it.

A weight is a tensor (format ``dense``, of which there may be a ``packed`` copy) or an ``Operand`` of a
registered format. What is not about one format asks here.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorafast.core.problem import DENSE
from lorafast.operands import (
    bitsandbytes,
    bitsandbytes_state,
    finegrained_fp8,
    packed,
    torchao,
)
from lorafast.operands import dense as _dense
from lorafast.operands.dense import kept_transposed
from lorafast.operands.eight_bit import FP8, Int8
from lorafast.operands.four_bit import FP4, NF4
from lorafast.operands.mxfp4 import MXFP4
from lorafast.operands.operand import Operand, Split
from lorafast.operands.w8a8 import W8A8

__all__ = [
    "DENSE",
    "FP4",
    "FP8",
    "MXFP4",
    "NF4",
    "W8A8",
    "Int8",
    "Operand",
    "Split",
    "Weight",
    "activations",
    "add_linear_",
    "add_linear_transposed_",
    "as_dense",
    "build",
    "describe",
    "describe_split",
    "finished_linear",
    "foreign_keys",
    "format_of",
    "formats",
    "is_packed",
    "is_same_kind",
    "kept_transposed",
    "kind_of",
    "linear",
    "linear_transposed",
    "of_foreign_state",
    "of_layer",
    "parameters_of",
    "quantize",
    "register",
    "row_blocks",
    "stored",
    "to_foreign_state",
    "unregister",
    "why_not_of_layer",
]

Weight = Tensor | Operand
_formats: dict[str, type[Operand]] = {}
_LIBRARIES: tuple[Any, ...] = (bitsandbytes, torchao, finegrained_fp8)
"""Whose layers are read: each has ``weight_of`` and ``why_not``."""


def register(operand: type[Operand]) -> type[Operand]:
    """Adds a format; a decorator.

    Raises:
        ValueError: there is one of this name, or it is no word.
    """
    name = getattr(operand, "format", None)
    if not isinstance(name, str) or name in formats() or not name.isidentifier():
        raise ValueError(f"format is {name!r}, expected a word that no other format has")
    _formats[name] = operand
    return operand


def unregister(name: str) -> None:
    """Takes a format away again.

    Raises:
        KeyError: there is none of this name.
    """
    del _formats[name]


def formats() -> tuple[str, ...]:
    """The names of the formats."""
    return (DENSE, *_formats)


def format_of(weight: Weight) -> str:
    """The name of the format of ``weight``."""
    return weight.format if isinstance(weight, Operand) else DENSE


def kind_of(format: str) -> type[Operand] | None:
    """The class of the operands of a format; None for the dense one, and for one that isn't known."""
    return _formats.get(format)


def parameters_of(weight: Weight) -> str:
    """What else it takes to read the tensors of ``weight``."""
    return weight.parameters if isinstance(weight, Operand) else ""


def of_layer(layer: nn.Module) -> Operand | None:
    """The frozen weight of a layer that one of the formats claims, None if none does.

    A layer with a method ``frozen_operand`` says it itself.
    """
    says = getattr(type(layer), "frozen_operand", None)
    if says is not None:
        weight: Operand = says(layer)
        return weight
    for operand in _formats.values():
        found = operand.of_layer(layer)
        if found is not None:
            return found
    for library in _LIBRARIES:
        read = library.weight_of(layer)
        if read is not None:
            return read
    return None


def why_not_of_layer(layer: nn.Module) -> str | None:
    """Why ``of_layer`` has no weight of a layer of another library that it knows, or None."""
    reasons = (library.why_not(layer) for library in _LIBRARIES)
    return next((reason for reason in reasons if reason is not None), None)


def of_foreign_state(state: Mapping[str, Tensor]) -> Operand | None:
    """The weight in a layer's state, if that has the keys of another library's layer; else None.

    Raises:
        ValueError: it has, and the weight doesn't fit; the message says what.
    """
    return bitsandbytes_state.from_state(state) if bitsandbytes_state.is_of_layer(state) else None


def foreign_keys(state: Mapping[str, Tensor]) -> set[str]:
    """The keys of such a state that are of the weight."""
    if not bitsandbytes_state.is_of_layer(state):
        return set()
    return bitsandbytes_state.keys_of(state)


def to_foreign_state(weight: Operand) -> dict[str, Tensor] | None:
    """The weight in a layer's state as the library has it that defined the format; None if none has."""
    return bitsandbytes_state.to_state(weight)


def is_same_kind(one: Operand, other: Operand) -> bool:
    """Whether their tensors stand for one another: they may be rounded to other dtypes."""
    return (
        type(one) is type(other)
        and one.shape == other.shape
        and one.tensors().keys() == other.tensors().keys()
        and all(
            t.numel() * t.element_size() == o.numel() * o.element_size()
            for t, o in zip(one.tensors().values(), other.tensors().values(), strict=True)
        )
        and getattr(one, "block", None) == getattr(other, "block", None)
        and getattr(one, "nested_block", None) == getattr(other, "nested_block", None)
    )


def quantize(weight: Tensor, format: str, **options: object) -> Operand:
    """``weight [N, K]`` in a format; int8 as bitsandbytes has it.

    Raises:
        ValueError: nothing quantizes to the format, or it has not these options.
    """
    of = getattr(kind_of(format), "of", None) if isinstance(format, str) else None
    known = [name for name in formats() if hasattr(kind_of(name), "of")]
    if of is None:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(known)}")
    if format == Int8.format:
        of = Int8.with_scb
    accepted = inspect.signature(of).parameters
    for name, value in options.items():
        if name not in accepted:
            takes = ", ".join(one for one in accepted if one != "weight") or "no options"
            raise ValueError(f"{name} is {value!r}, and {format} takes {takes}")
    made: Operand = of(weight, **options)
    return made


def describe(weight: Weight) -> str:
    """Format, names of its tensors, dtype if cast, and parameters, as text: with ``stored`` what
    ``build`` needs.

    Raises:
        ValueError: the name of a tensor has a comma or a bar, which this text separates by.
    """
    if not isinstance(weight, Operand):
        return DENSE
    keys = weight.tensors()
    names = ",".join(keys)
    if "|" in names or names.count(",") != len(keys) - 1:
        raise ValueError(f"weight is stored in {list(keys)}, expected names without , and |")
    cast = "" if weight.cast is None else str(weight.cast).removeprefix("torch.")
    return f"{weight.format}|{names}|{cast}|{weight.parameters}"


def describe_split(weight: Operand, split: Split) -> tuple[str, str]:
    """What ``build`` needs to have all of ``weight`` from the tensors of ``split``, and a part of it."""
    format, _, cast, _ = describe(weight).split("|", 3)
    names = ",".join(split.tensors)
    whole, part = (f"{format}|{names}|{cast}|{one}" for one in (split.parameters, split.of_part))
    return whole, part


def stored(weight: Weight) -> list[Tensor]:
    """The tensors that ``weight`` is stored in."""
    return list(weight.tensors().values()) if isinstance(weight, Operand) else [weight]


def build(tensors: Sequence[Tensor], description: str) -> Weight:
    """The weight again, from what ``stored`` and ``describe`` gave.

    Raises:
        ValueError: the format is not known, or the tensors don't fit.
    """
    if description == DENSE:
        if len(tensors) != 1:
            raise ValueError(f"weight has {len(tensors)} tensors, expected one: it is {DENSE}")
        return tensors[0]
    name, *rest = description.split("|", 3)
    if name not in _formats:
        raise ValueError(f"format is {name!r}, expected one of {', '.join(formats())}")
    if len(rest) != 3:
        raise ValueError(
            f"format is {description!r}, expected what lorafast.operands.describe gives"
        )
    keys, dtype, parameters = rest[0].split(","), rest[1], rest[2]
    if len(keys) != len(tensors):
        raise ValueError(f"weight has {len(tensors)} tensors, expected {', '.join(keys)}")
    try:
        weight = _formats[name].build(dict(zip(keys, tensors, strict=True)), parameters)
    except KeyError as error:
        raise ValueError(f"weight has {', '.join(keys)}, and {name} needs {error}") from error
    if not dtype:
        return weight
    cast = getattr(torch, dtype, None)
    if not isinstance(cast, torch.dtype):
        raise ValueError(f"weight is cast to {dtype!r}, expected the name of a dtype")
    return weight.to(cast)


def as_dense(weight: Weight) -> Tensor:
    """W ``[N, K]`` as a tensor."""
    return weight.dense() if isinstance(weight, Operand) else weight


def activations(x: Tensor, weight: Weight) -> Tensor:
    """What ``weight`` multiplies in the place of x; differentiable, as if it were x."""
    if not isinstance(weight, Operand):
        return x
    rounded = weight.activations(x)
    return x if rounded is x else x + (rounded - x).detach()


def row_blocks(weight: Weight, count: int) -> Iterator[Tensor]:
    """W's rows in about ``count`` blocks, dense, one by one; at least one, if need be without rows."""
    N = weight.shape[0]
    step = max(-(-N // count), 1)
    for begin in range(0, max(N, 1), step):
        end = min(begin + step, N)
        yield weight[begin:end] if isinstance(weight, Tensor) else weight.rows(begin, end)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """``x·Wᵀ + bias`` for ``x [M, K]``."""
    if isinstance(weight, Tensor):
        return _dense.linear(x, weight, bias)
    return weight.linear(x, bias)


def linear_transposed(dy: Tensor, weight: Weight) -> Tensor:
    """``dy·W`` for ``dy [M, N]``."""
    if isinstance(weight, Tensor):
        return _dense.linear_transposed(dy, weight)
    return weight.linear_transposed(dy)


def add_linear_(y: Tensor, x: Tensor, weight: Weight) -> Tensor:
    """``y += x·Wᵀ``."""
    if isinstance(weight, Tensor):
        return _dense.add_linear_(y, x, weight)
    return y.add_(weight.linear(x, None))


def add_linear_transposed_(dx: Tensor, dy: Tensor, weight: Weight) -> Tensor:
    """``dx += dy·W``."""
    if isinstance(weight, Tensor):
        return _dense.add_linear_transposed_(dx, dy, weight)
    return dx.add_(weight.linear_transposed(dy))


def is_packed(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether there is a packed copy of ``weight`` as it is now, for x of ``dtype``."""
    if isinstance(weight, Operand) or weight.dtype is not dtype:
        return False
    return packed.is_packed(weight)


def finished_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor | None:
    """``x·Wᵀ + bias`` by a product that accumulates onto nothing, a packed copy's or that of a format;
    None if ``add_linear_`` does better."""
    if isinstance(weight, Tensor):
        return packed.linear_if_packed(x, weight, bias)
    return weight.linear(x, bias)


for _operand in (NF4, FP4, Int8, FP8, MXFP4, W8A8):
    register(_operand)
