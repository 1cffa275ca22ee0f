"""A problem over a quantized weight: what reads it, and what that takes."""

from torch import Tensor

from lorafast import operands
from lorafast.core.problem import Problem
from lorafast.operands import FP4, FP8, MXFP4, NF4, Int8, Weight
from lorafast.operands.eight_bit import EightBit
from lorafast.operands.four_bit import FourBit

_KINDS: tuple[type, ...] = (NF4, FP4, Int8, FP8, MXFP4)
_STORED = ("float16", "bfloat16", "float32")


def why_not(p: Problem) -> str | None:
    """Why the kernels can't read the weight, which isn't dense, or None."""
    if operands.kind_of(p.format) not in _KINDS:
        return f"the kernels read dense weights; this one is stored as {p.format}"
    words = p.format_parameters.split(",")
    if not any(name in words for name in _STORED):
        return (
            f"the weight is stored as {p.format} of {p.format_parameters}, the kernels round to "
            "float16, bfloat16 and float32"
        )
    return None


def code_bytes(p: Problem) -> float:
    """Bytes of an element's code; its share of the scales is small beside them."""
    kind = operands.kind_of(p.format)
    return 1.0 if kind is not None and issubclass(kind, EightBit) else 0.5


def shares_scales(p: Problem, group: int) -> bool:
    """Whether groups of so many neighbours in a row of W have one scale each, which products can read.

    Those of MXFP4 they can't: bytes that several warps keep in shared memory, each of its own accord.
    """
    kind = operands.kind_of(p.format)
    assert kind is not None
    if p.K % group or issubclass(kind, MXFP4):
        return False
    words = p.format_parameters.split(",")
    if issubclass(kind, EightBit):
        return len(words) == 1 or int(words[1].split("x")[1]) % group == 0
    return int(words[2]) % group == 0


def line(p: Problem) -> str:
    """The launch that makes W dense, in a line."""
    return f"dequantize: W of its {p.format} codes, in memory that layers share"


def dequantize(weight: Weight, W: Tensor) -> None:
    """Writes W of a quantized weight into ``W [N, K]``."""
    from lorafast.kernels.dequantize.kernel import dequantize as write

    if type(weight) in _KINDS:
        assert isinstance(weight, FourBit | EightBit | MXFP4)
        write(weight, W)
    else:  # a subclass may have rows of its own
        W.copy_(operands.as_dense(weight))
