"""Parts of a quantized weight made dense by the native kernels, and the base products over such parts.

By few rows of x, tiles of W are multiplied where they are made, in one call. By more, a part is made
dense in memory that all layers share, and multiplied by oneDNN or MKL.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafast import operands
from lorafast.backends import kernel_formats, workspace
from lorafast.backends.cpu import native
from lorafast.backends.kernel_formats import Coded
from lorafast.backends.plan import Run
from lorafast.core.codebooks import E2M1, codebook
from lorafast.operands import MXFP4, Weight
from lorafast.operands.eight_bit import EightBit
from lorafast.operands.four_bit import NESTED, FourBit
from lorafast.operands.mxfp4 import BLOCK

native.why_not_loaded()  # loads them
_four_bit = torch.ops.lorafast_cpu.dequantize_four_bit.default
_eight_bit = torch.ops.lorafast_cpu.dequantize_eight_bit.default
_linear_four_bit = torch.ops.lorafast_cpu.linear_four_bit.default
_linear_eight_bit = torch.ops.lorafast_cpu.linear_eight_bit.default
_lora_linear_four_bit = torch.ops.lorafast_cpu.lora_linear_four_bit.default
_lora_linear_eight_bit = torch.ops.lorafast_cpu.lora_linear_eight_bit.default
_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Of dtypes, as the kernels count them."""
_PART = 32 << 20
"""Bytes of a part, about. At 4096 x 4096 all of W was the fastest, in bfloat16: by parts of 4 MB, y
took up to a twentieth longer, and dx up to a quarter."""
_WHOLE = 32
"""Rows, or columns, that a part has a multiple of."""
_FEW = {torch.bfloat16: (64, 48), torch.float32: (128, 128), torch.float16: (128, 512)}
"""Rows of x, and of dy, up to which a product straight from the codes is ahead of making W dense:
measured with AVX-512 and, for bfloat16, the processor's own product. PyTorch's dy·W is slow in
float16."""
_LARGE, _FEW_OF_LARGE = 1 << 22, (128, 128)
"""Elements of W from which no cache keeps it until it is multiplied, and what then holds in bfloat16:
measured from 1024 x 1024 to 4096 x 14336."""


def served(weight: Weight) -> Coded | None:
    """The operand, if there is a native kernel for its format and its dtypes."""
    coded = kernel_formats.coded(weight)
    if coded is None or not {coded.dtype, coded.stored_dtype} <= _NUMBERS.keys():
        return None
    return coded


def part(weight: Coded, rows: tuple[int, int], columns: tuple[int, int], out: Tensor) -> Tensor:
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


def of_few_rows(x: Tensor, weight: Coded, bias: Tensor | None, transposed: bool = False) -> Tensor:
    """``x·Wᵀ + bias``, or transposed ``x·W``, straight from the codes: a tile of W at a time is made
    dense and multiplied within the first cache of a core. Sums are float32, rounded once.
    """
    out = x.new_empty((x.shape[0], weight.shape[1 if transposed else 0]))
    ending = _stored_number(weight), transposed, bias, out
    if isinstance(weight, EightBit):
        _linear_eight_bit(x, *_eight_bit_codes(weight), *ending)
    elif isinstance(weight, MXFP4):
        _linear_four_bit(x, *_mxfp4_codes(weight, 0, weight.shape[0]), *ending)
    else:
        _linear_four_bit(x, *_four_bit_codes(weight), *ending)
    return out


def layer_of(weight: Coded) -> Run:
    """``lora_linear`` over the tensors of ``weight``, or of one like it, straight from the codes:
    ``x, stored, lora_A, lora_B, scaling, bias`` gives ``y, s``. What else it takes is read here, once.
    """
    stored = _stored_number(weight)
    if isinstance(weight, EightBit):
        numbers = (*_eight_bit_codes(weight)[2:], stored)

        def eight_bit(
            x: Tensor,
            stored: list[Tensor],
            A: Tensor,
            B: Tensor,
            scaling: float,
            bias: Tensor | None,
        ) -> tuple[Tensor, Tensor]:
            codes, scale = stored
            return _lora_linear_eight_bit(x, codes, scale, *numbers, bias, A, B, scaling)

        return eight_bit
    if isinstance(weight, MXFP4):

        def mxfp4(
            x: Tensor,
            stored: list[Tensor],
            A: Tensor,
            B: Tensor,
            scaling: float,
            bias: Tensor | None,
        ) -> tuple[Tensor, Tensor]:
            again = type(weight).build(dict(zip(names, stored, strict=True)), weight.parameters)
            codes = _mxfp4_codes(again, 0, again.shape[0])
            return _lora_linear_four_bit(x, *codes, number, bias, A, B, scaling)

        names, number = tuple(weight.tensors()), stored
        return mxfp4
    order = tuple(weight.tensors())
    places = [
        order.index(name) if name in order else None for name in ("weight", "absmax", *NESTED)
    ]
    numbers = (*_four_bit_codes(weight)[2 + len(NESTED) :], stored)

    def four_bit(
        x: Tensor, stored: list[Tensor], A: Tensor, B: Tensor, scaling: float, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        codes = [None if place is None else stored[place] for place in places]
        return _lora_linear_four_bit(x, *codes, *numbers, bias, A, B, scaling)

    return four_bit


def _stored_number(weight: Coded) -> int:
    """What W is rounded to, as the kernels count dtypes."""
    stored = weight.stored_dtype
    return _NUMBERS[weight.dtype if stored is torch.float32 else stored]


def has_few_rows(M: int, dtype: torch.dtype, weight: Coded, transposed: bool = False) -> bool:
    """Whether a product by ``M`` rows of x is ahead straight from the codes; it rounds W to one dtype
    alone."""
    has = native.multiplies_bfloat16() if dtype is torch.bfloat16 else native.has_avx512()
    once = weight.stored_dtype in (dtype, torch.float32) or dtype is torch.float32
    N, K = weight.shape
    few = _FEW_OF_LARGE if dtype is torch.bfloat16 and N * K >= _LARGE else _FEW[dtype]
    return has and once and few[transposed] >= M


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``x·Wᵀ + bias`` for ``x [M, K]``, by parts of rows of W."""
    quantized = served(weight)
    if quantized is None:
        return operands.linear(x, weight, bias)
    if has_few_rows(x.shape[0], x.dtype, quantized):
        return of_few_rows(x, quantized, bias)
    N, K = quantized.shape
    step = _count(N, K, quantized.dtype)
    with workspace.borrowed(step, K, quantized.dtype, x.device) as memory:
        to = memory.view(-1)
        if step == N:
            return F.linear(x, part(quantized, (0, N), (0, K), to), bias)
        y = x.new_empty((x.shape[0], N))
        for begin in range(0, N, step):
            end = min(begin + step, N)
            W = part(quantized, (begin, end), (0, K), to)
            y[:, begin:end] = F.linear(x, W, None if bias is None else bias[begin:end])
        return y


def linear_transposed(dy: Tensor, weight: Weight) -> Tensor:
    """``dy·W`` for ``dy [M, N]``, by parts of columns of W: sums over rows are rounded once."""
    quantized = served(weight)
    if quantized is None:
        return operands.linear_transposed(dy, weight)
    if has_few_rows(dy.shape[0], dy.dtype, quantized, transposed=True):
        return of_few_rows(dy, quantized, None, transposed=True)
    N, K = quantized.shape
    step = _count(K, N, quantized.dtype)
    with workspace.borrowed(N, step, quantized.dtype, dy.device) as memory:
        to = memory.view(-1)
        if step == K:
            return dy @ part(quantized, (0, N), (0, K), to)
        dx = dy.new_empty((dy.shape[0], K))
        for begin in range(0, K, step):
            end = min(begin + step, K)
            dx[:, begin:end] = dy @ part(quantized, (0, N), (begin, end), to)
        return dx


def _count(most: int, length: int, dtype: torch.dtype) -> int:
    """How many of so many rows or columns of that length a part has."""
    return min(max(_PART // max(length * dtype.itemsize, 1) // _WHOLE * _WHOLE, _WHOLE), most)
