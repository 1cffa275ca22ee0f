"""A problem over a quantized weight: what reads it, and what that takes."""

from torch import Tensor

from lorafast import operands
from lorafast.backends import kernel_formats
from lorafast.core.problem import Problem
from lorafast.operands import MXFP4, Weight
from lorafast.operands.eight_bit import EightBit

_STORED = ("float16", "bfloat16", "float32")


def why_not(p: Problem) -> str | None:
    """Why the kernels can't read the weight, which isn't dense, or None."""
    reason = kernel_formats.why_not(p.format)
    if reason is not None:
        return reason
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

    coded = kernel_formats.coded(weight)
    if coded is None:
        W.copy_(operands.as_dense(weight))
    else:
        write(coded, W)
