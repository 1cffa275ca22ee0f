"""Which formats of quantized weights the kernels read: of every backend that has kernels for any."""

from lorafast import operands
from lorafast.operands import FP4, FP8, MXFP4, NF4, Int8, Weight
from lorafast.operands.eight_bit import EightBit
from lorafast.operands.four_bit import FourBit

Coded = FourBit | EightBit | MXFP4
"""A weight in one of them."""
_KINDS = (NF4, FP4, Int8, FP8, MXFP4)


def why_not(format: str) -> str | None:
    """A sentence if no kernel reads quantized weights of that format, else None."""
    if operands.kind_of(format) in _KINDS:
        return None
    names = ", ".join(kind.format for kind in _KINDS)
    return f"the weight is stored as {format}, the kernels read dense ones and {names}"


def coded(weight: Weight) -> Coded | None:
    """The weight, if kernels read it. A subclass may have rows of its own: they don't."""
    return weight if isinstance(weight, Coded) and type(weight) in _KINDS else None
