"""How a frozen weight is stored: one file a format, and the products with it.

A weight is a tensor (format ``dense``, of which there may be a ``packed`` copy) or an ``Operand`` of a
registered format. What is not about one format asks here.
"""

from collections.abc import Sequence

from torch import Tensor

from lorafast.core.problem import DENSE
from lorafast.operands import dense as _dense
from lorafast.operands import packed
from lorafast.operands.operand import Operand

__all__ = [
    "DENSE",
    "Operand",
    "Weight",
    "add_linear_",
    "add_linear_transposed_",
    "as_dense",
    "build",
    "describe",
    "format_of",
    "formats",
    "linear",
    "linear_transposed",
    "packed_linear",
    "register",
    "stored",
    "unregister",
]

Weight = Tensor | Operand
_formats: dict[str, type[Operand]] = {}


def register(operand: type[Operand]) -> type[Operand]:
    """Adds a format; a decorator.

    Raises:
        ValueError: there is one of this name, or it is no word.
    """
    name = operand.format
    if name in _formats or name == DENSE or not name.isidentifier():
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


def describe(weight: Weight) -> str:
    """Format, names of its tensors and parameters, as text: with ``stored`` what ``build`` needs."""
    if not isinstance(weight, Operand):
        return DENSE
    return f"{weight.format}|{','.join(weight.tensors())}|{weight.parameters}"


def stored(weight: Weight) -> list[Tensor]:
    """The tensors that ``weight`` is stored in."""
    return list(weight.tensors().values()) if isinstance(weight, Operand) else [weight]


def build(tensors: Sequence[Tensor], description: str) -> Weight:
    """The weight again, from what ``stored`` and ``describe`` gave.

    Raises:
        ValueError: the format is not known, or the tensors don't fit.
    """
    if description == DENSE:
        (weight,) = tensors
        return weight
    name, names, parameters = [*description.split("|", 2), "", ""][:3]
    if name not in _formats:
        raise ValueError(f"format is {name!r}, expected one of {', '.join(formats())}")
    keys = names.split(",")
    if len(keys) != len(tensors):
        raise ValueError(f"weight has {len(tensors)} tensors, expected {', '.join(keys)}")
    return _formats[name].build(dict(zip(keys, tensors, strict=True)), parameters)


def as_dense(weight: Weight) -> Tensor:
    """W ``[N, K]`` as a tensor."""
    return weight.dense() if isinstance(weight, Operand) else weight


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """``x·Wᵀ + bias`` for ``x [M, K]``."""
    if isinstance(weight, Operand):
        return weight.linear(x, bias)
    return _dense.linear(x, weight, bias)


def linear_transposed(dy: Tensor, weight: Weight) -> Tensor:
    """``dy·W`` for ``dy [M, N]``."""
    if isinstance(weight, Operand):
        return weight.linear_transposed(dy)
    return _dense.linear_transposed(dy, weight)


def add_linear_(y: Tensor, x: Tensor, weight: Weight) -> Tensor:
    """``y += x·Wᵀ``, in one rounding where the weight is dense."""
    if isinstance(weight, Operand):
        return y.add_(weight.linear(x, None))
    return _dense.add_linear_(y, x, weight)


def add_linear_transposed_(dx: Tensor, dy: Tensor, weight: Weight) -> Tensor:
    """``dx += dy·W``, in one rounding where the weight is dense."""
    if isinstance(weight, Operand):
        return dx.add_(weight.linear_transposed(dy))
    return _dense.add_linear_transposed_(dx, dy, weight)


def packed_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor | None:
    """``x·Wᵀ + bias`` by a packed copy, None if there is none to be used."""
    if isinstance(weight, Operand):
        return None
    return packed.linear_if_packed(x, weight, bias)
