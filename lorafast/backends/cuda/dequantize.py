"""``csrc/cuda/dequantize.cu``: a quantized weight made dense in one launch."""

import torch
from torch import Tensor

from lorafast import operands
from lorafast.backends import kernel_formats
from lorafast.backends.cost import LAUNCH_SECONDS, Device
from lorafast.core.codebooks import E2M1, codebook
from lorafast.core.problem import Problem
from lorafast.operands import FP8, MXFP4, Int8, Weight
from lorafast.operands.eight_bit import EightBit
from lorafast.operands.four_bit import NESTED, FourBit
from lorafast.operands.mxfp4 import BLOCK

NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 0}
"""Of dtypes, as the kernels count them. What is rounded to float64 is as it was, in float32."""
_EIGHT_BIT = (Int8.format, FP8.format)
_MOST = 2**31
_SHARE = 0.75
"""Of the bandwidth: measured on an H200, of NF4 with nested scales at 14336 x 4096; others reach 0.8."""
_BYTES_OF_SCALES = 0.07
"""For an element of 4 bits, at most: a float32 each 64 of them is 0.0625 bytes."""


def why_refused(p: Problem) -> str | None:
    """A sentence if no kernel makes the problem's weight dense, else None."""
    reason = kernel_formats.why_not(p.format)
    if reason is not None:
        return reason
    if p.format in _EIGHT_BIT and p.K >= _MOST:
        return f"the weight has {p.K} columns of {p.format}, expected fewer than 2**31"
    return None


def line(p: Problem) -> str:
    """The launch, for readers of ``explain``."""
    return f"dequantize {p.format}: W {p.N} x {p.K} in a workspace, one launch"


def moved(p: Problem) -> float:
    """Bytes: the codes and their scales, and W written."""
    return p.N * p.K * (bytes_of_codes(p) + p.dtype.itemsize)


def bytes_of_codes(p: Problem) -> float:
    """What an element is stored in, with its share of a scale."""
    return 1.0 if p.format in _EIGHT_BIT else 0.5 + _BYTES_OF_SCALES


def codes_at_once(p: Problem) -> int:
    """Of 16 bytes."""
    return 16 if p.format in _EIGHT_BIT else 32


def block_of(p: Problem) -> int:
    """Elements along a row that share a scale, 0 where all of a row do: by ``format_parameters``."""
    if p.format == MXFP4.format:
        return BLOCK
    words = p.format_parameters.split(",")
    if p.format in _EIGHT_BIT:  # dtype[,rows x columns]
        return int(words[1].partition("x")[2]) if len(words) > 1 else 0
    return int(words[2])  # N x K,dtype,block[,nested block]


def seconds(p: Problem, device: Device) -> float:
    """Of the launch, which memory binds."""
    return moved(p) / device.bandwidth / _SHARE + LAUNCH_SECONDS


def dequantize(weight: Weight, out: Tensor) -> None:
    """W ``[N, K]`` into ``out``, contiguous, of float32, bfloat16 or float16: bit for bit
    ``weight.rows(0, N)``. One launch on the current stream.

    Raises:
        TypeError: the weight is of no format that the kernels have.
        RuntimeError: a tensor of it is on another device, or its memory is gone.
    """
    if four_bit_arguments := of_four_bit(weight):
        torch.ops.lorafast_cuda.dequantize_four_bit.default(*four_bit_arguments, out)
    else:
        torch.ops.lorafast_cuda.dequantize_eight_bit.default(*of_eight_bit(weight), out)


def of_four_bit(weight: Weight) -> tuple[object, ...] | None:
    """The arguments that say what 4-bit codes are; None of others."""
    if isinstance(weight, FourBit):
        t = weight.tensors()
        nested = [t.get(name) for name in NESTED]
        return (
            t["weight"], t["absmax"], *nested, codebook(weight.numbers, t["absmax"]),
            weight.block, weight.nested_block or 0, False, NUMBERS[weight.stored_dtype],
        )  # fmt: skip
    if isinstance(weight, MXFP4):
        return (
            weight.blocks, weight.scales, None, None, None, codebook(E2M1, weight.blocks), BLOCK, 0,
            True, NUMBERS[weight.stored_dtype],
        )  # fmt: skip
    return None


def of_eight_bit(weight: Weight) -> tuple[object, ...]:
    """The arguments that say what 8-bit codes are.

    Raises:
        TypeError: the weight has no codes that the kernels read.
    """
    if not isinstance(weight, EightBit):
        kind = operands.format_of(weight)
        raise TypeError(f"weight is {kind}, expected a format that the kernels make dense")
    return (
        weight.tensors()["weight"], weight.scale, weight.unit, weight.code_dtype is torch.int8,
        *(weight.block or (0, 0)), NUMBERS[weight.stored_dtype],
    )  # fmt: skip
