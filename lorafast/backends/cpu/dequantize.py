"""Parts of a quantized weight made dense by the native kernels, and the base products over such parts.

A part fits the caches and is multiplied at once: W is never dense as a whole. By few rows of x, tiles
of W are multiplied where they are made, in one call.
"""

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafast import operands
from lorafast.backends import workspace
from lorafast.backends.cpu import native
from lorafast.core.codebooks import E2M1, codebook
from lorafast.operands import FP4, FP8, MXFP4, NF4, Int8, Weight
from lorafast.operands.eight_bit import EightBit
from lorafast.operands.four_bit import NESTED, FourBit
from lorafast.operands.mxfp4 import BLOCK

native.why_not_loaded()  # loads them
_four_bit = torch.ops.lorafast_cpu.dequantize_four_bit.default
_eight_bit = torch.ops.lorafast_cpu.dequantize_eight_bit.default
_linear_four_bit = torch.ops.lorafast_cpu.linear_four_bit.default
_linear_eight_bit = torch.ops.lorafast_cpu.linear_eight_bit.default
_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Of dtypes, as the kernels count them."""
_PART = 4 << 20
"""Bytes of a part, about. At 4096 x 4096 parts of 512 rows or columns were the fastest, in bfloat16."""
_WHOLE = 32
"""Rows, or columns, that a part has a multiple of."""
_FEW = {True: 32, False: 4}
"""Rows of x up to which a product straight from the codes is ahead, with the processor's own bfloat16
product and without it."""


Quantized = FourBit | EightBit | MXFP4
"""The operands that have native kernels here."""
_KINDS = (NF4, FP4, Int8, FP8, MXFP4)


def serves_format(name: str) -> bool:
    """Whether there is a native kernel for a format."""
    return operands.kind_of(name) in _KINDS


def served(weight: Weight) -> Quantized | None:
    """The operand, if there is a native kernel for its format and its dtypes."""
    # A subclass may have rows of its own.
    if not isinstance(weight, Quantized) or type(weight) not in _KINDS:
        return None
    if {weight.dtype, weight.stored_dtype} <= _NUMBERS.keys():
        return weight
    return None


def part(weight: Quantized, rows: tuple[int, int], columns: tuple[int, int], out: Tensor) -> Tensor:
    """W[rows, columns], the first and the last of each, into the first elements of ``out``, flat."""
    (top, bottom), (left, right) = rows, columns
    to = out[: (bottom - top) * (right - left)].view(bottom - top, right - left)
    stored = _NUMBERS[weight.stored_dtype]
    if isinstance(weight, EightBit):
        _eight_bit(*_eight_bit_codes(weight), top, left, stored, to)
    elif isinstance(weight, MXFP4):
        _four_bit(*_mxfp4_codes(weight, top, bottom), 0, left, stored, to)
    else:
        _four_bit(*_four_bit_codes(weight), top, left, stored, to)
    return to


def _four_bit_codes(weight: FourBit) -> tuple[Any, ...]:
    """What the kernels read a weight from, up to ``low_first``."""
    t = weight.tensors()
    nested = [t.get(name) for name in NESTED]
    return (
        t["weight"], t["absmax"], *nested, codebook(weight.numbers, t["absmax"]), *weight.shape,
        weight.block, weight.nested_block or 0, False,
    )  # fmt: skip


def _mxfp4_codes(weight: MXFP4, top: int, bottom: int) -> tuple[Any, ...]:
    """The same, of rows ``top`` to ``bottom``."""
    codes, factors = weight.blocks[top:bottom], weight.factors(top, bottom)
    return (
        codes, factors, None, None, None, codebook(E2M1, codes), bottom - top, weight.shape[1],
        BLOCK, 0, True,
    )  # fmt: skip


def _eight_bit_codes(weight: EightBit) -> tuple[Any, ...]:
    """What the kernels read a weight from, up to ``block_columns``."""
    codes = weight.tensors()["weight"]
    integers = weight.code_dtype is torch.int8
    return codes, weight.scale, weight.unit, integers, *(weight.block or (0, 0))


def of_few_rows(
    x: Tensor, weight: Quantized, bias: Tensor | None, transposed: bool = False
) -> Tensor:
    """``x·Wᵀ + bias``, or transposed ``x·W``, straight from the codes: a tile of W at a time is made
    dense and multiplied within the first cache of a core. Sums are float32, rounded once.
    """
    out = x.new_empty((x.shape[0], weight.shape[1 if transposed else 0]))
    stored = weight.stored_dtype
    ending = _NUMBERS[weight.dtype if stored is torch.float32 else stored], transposed, bias, out
    if isinstance(weight, EightBit):
        _linear_eight_bit(x, *_eight_bit_codes(weight), *ending)
    elif isinstance(weight, MXFP4):
        _linear_four_bit(x, *_mxfp4_codes(weight, 0, weight.shape[0]), *ending)
    else:
        _linear_four_bit(x, *_four_bit_codes(weight), *ending)
    return out


def _has_few_rows(x: Tensor, weight: Quantized) -> bool:
    """Whether ``of_few_rows`` is ahead; it rounds W to one dtype alone."""
    few = _FEW[native.multiplies_bfloat16() and x.dtype is torch.bfloat16]
    once = weight.stored_dtype in (weight.dtype, torch.float32) or weight.dtype is torch.float32
    return x.shape[0] <= few and once


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``x·Wᵀ + bias`` for ``x [M, K]``, by parts of rows of W."""
    quantized = served(weight)
    if quantized is None:
        return operands.linear(x, weight, bias)
    if _has_few_rows(x, quantized):
        return of_few_rows(x, quantized, bias)
    N, K = quantized.shape
    memory, step = _workspace(N, K, quantized.dtype)
    if step >= N:
        return F.linear(x, part(quantized, (0, N), (0, K), memory), bias)
    y = x.new_empty((x.shape[0], N))
    for begin in range(0, N, step):
        end = min(begin + step, N)
        W = part(quantized, (begin, end), (0, K), memory)
        y[:, begin:end] = F.linear(x, W, None if bias is None else bias[begin:end])
    return y


def linear_transposed(dy: Tensor, weight: Weight) -> Tensor:
    """``dy·W`` for ``dy [M, N]``, by parts of columns of W: sums over rows are rounded once."""
    quantized = served(weight)
    if quantized is None:
        return operands.linear_transposed(dy, weight)
    if _has_few_rows(dy, quantized):
        return of_few_rows(dy, quantized, None, transposed=True)
    N, K = quantized.shape
    memory, step = _workspace(K, N, quantized.dtype)
    if step >= K:
        return dy @ part(quantized, (0, N), (0, K), memory)
    dx = dy.new_empty((dy.shape[0], K))
    for begin in range(0, K, step):
        end = min(begin + step, K)
        dx[:, begin:end] = dy @ part(quantized, (0, N), (begin, end), memory)
    return dx


class _Workspaces(threading.local):
    """A thread's memory for parts, by dtype, as large as the largest that it has needed."""

    def __init__(self) -> None:
        self.of: dict[torch.dtype, Tensor] = {}


_workspaces = _Workspaces()
workspace.kept_elsewhere(lambda: _workspaces.of.clear())


def _workspace(count: int, length: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Memory for a part, and how many of ``count`` rows or columns of that length it has."""
    step = max(_PART // max(length * dtype.itemsize, 1) // _WHOLE * _WHOLE, _WHOLE)
    needed = min(step, count) * length
    memory = _workspaces.of.get(dtype)
    if memory is None or memory.numel() < needed:
        with torch.inference_mode(False):  # else no call outside of that mode could write it
            memory = torch.empty(needed, dtype=dtype)
        _workspaces.of[dtype] = memory
    return memory, step
