"""W ``[N, K]`` of a quantized weight, dense, in one launch: to the bit what ``Operand.rows`` gives.

W and its codes lie row by row, so both are read and written as one line of elements, whatever N and K
are: each byte of codes once, 16 bytes of W a thread. A group of eight elements that shares its scale
loads that once.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from lorafast.kernels.common.codes import (
    block_scales,
    e4m3_to_float,
    four_bit_codes,
    rounded,
)
from lorafast.kernels.common.launch import INTERPRETED, KEPT, capability, on_its_device
from lorafast.kernels.common.start import Start, key_of
from torch import Tensor

from lorafast.core.codebooks import E2M1, codebook
from lorafast.operands import MXFP4, Int8, Weight
from lorafast.operands.eight_bit import EightBit
from lorafast.operands.four_bit import NESTED, FourBit
from lorafast.operands.mxfp4 import BLOCK

PER_GROUP = 8
"""Neighbouring elements that a thread makes at once: 16 bytes of 16 bits each."""
GROUPS = 512
"""That a program makes: four a thread."""
CONVERTS_E4M3 = 89
"""The compute capability from which chips convert e4m3."""
OPTIONS: dict[str, object] = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
"""Of the compiler. A nested scale is a product and a sum, each rounded: no fused multiply-add."""


@triton.jit(do_not_specialize=[])
def four_bit_kernel(
    codes_ptr,
    numbers_ptr,
    scales_ptr,
    map_ptr,
    of_blocks_ptr,
    offset_ptr,
    w_ptr,
    size,
    code_bytes,
    BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    LOW_FIRST: tl.constexpr,
    STORED: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``W[i] = numbers[code i] · scale[i // BLOCK]`` for GROUPS · PER_GROUP elements a program.

    ``size``: elements of W; ``code_bytes``: of its codes.
    """
    BYTES: tl.constexpr = PER_GROUP // 2
    # 64 bits: W may have more than 2**31 elements.
    first_group = tl.program_id(0).to(tl.int64) * GROUPS
    groups = first_group + tl.arange(0, GROUPS)
    at = groups[:, None] * BYTES + tl.arange(0, BYTES)[None, :]  # [GROUPS, BYTES]
    codes = tl.load(codes_ptr + at, mask=at < code_bytes, other=0)
    numbers = tl.load(numbers_ptr + four_bit_codes(codes, LOW_FIRST))  # [GROUPS, PER_GROUP]
    elements = groups[:, None] * PER_GROUP + tl.arange(0, PER_GROUP)[None, :]
    if BLOCK % PER_GROUP == 0:
        begin = groups * PER_GROUP
        scales = block_scales(
            scales_ptr, map_ptr, of_blocks_ptr, offset_ptr, begin // BLOCK, begin < size, NESTED_BLOCK,
            INTERPRETED,
        )[:, None]  # fmt: skip
    else:
        scales = block_scales(
            scales_ptr, map_ptr, of_blocks_ptr, offset_ptr, elements // BLOCK, elements < size,
            NESTED_BLOCK, INTERPRETED,
        )  # fmt: skip
    w = rounded(numbers * scales, STORED, w_ptr.dtype.element_ty, INTERPRETED)
    tl.store(w_ptr + elements, w, mask=elements < size)


@triton.jit(do_not_specialize=["K", "scales_in_row"])
def eight_bit_kernel(
    codes_ptr,
    scale_ptr,
    w_ptr,
    size,
    K,
    unit,
    scales_in_row,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIKE: tl.constexpr,
    HARDWARE: tl.constexpr,
    STORED: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``W[i] = code i · (unit · scale)`` for GROUPS · PER_GROUP elements a program.

    Codes are int8, or uint8 that are e4m3. A scale is of ROWS × COLUMNS elements, with no
    COLUMNS of whole rows, with no ROWS of all.
    ALIKE: the elements of a group share their scale.
    """
    # 64 bits: W may have more than 2**31 elements.
    first = tl.program_id(0).to(tl.int64) * (GROUPS * PER_GROUP)
    groups = tl.arange(0, GROUPS)[:, None] * PER_GROUP  # [GROUPS, 1]
    elements = groups + tl.arange(0, PER_GROUP)[None, :]  # [GROUPS, PER_GROUP]
    inside = first + elements < size
    codes = tl.load(codes_ptr + first + elements, mask=inside, other=0)
    if codes_ptr.dtype.element_ty == tl.uint8:
        numbers = e4m3_to_float(codes, HARDWARE)
    else:
        numbers = codes.to(tl.float32)
    if ROWS == 0:
        scales = tl.load(scale_ptr) * unit
    else:
        of = groups if ALIKE else elements
        begin = first + of < size
        # 32 bits from the row on in which the program begins.
        row = first // K
        length = tl.cast(K, tl.uint32)
        past = (first - row * K).to(tl.uint32) + of.to(tl.uint32)
        rows = row + past // length
        if COLUMNS > 0:
            rows = rows // ROWS * scales_in_row + past % length // COLUMNS
        scales = tl.load(scale_ptr + rows, mask=begin, other=0.0) * unit
    w = rounded(numbers * scales, STORED, w_ptr.dtype.element_ty, INTERPRETED)
    tl.store(w_ptr + first + elements, w, mask=inside)


def dequantize(weight: Weight, W: Tensor) -> None:
    """Writes the weight into ``W [N, K]``, contiguous: float32, bfloat16 or float16.

    Each element is rounded from float32 to the weight's ``stored_dtype``, one of these, then to W's.
    """
    _write(W, weight)


@on_its_device
def _write(W: Tensor, weight: Weight) -> None:
    if not W.numel():
        return
    w = stored_in(weight)
    codes, numbers, scales, *nested = w.tensors
    rows, columns = w.block
    if numbers is None:
        assert codes is not None
        assert scales is not None
        run = eight_bit(tuple(W.shape), rows, columns, w.stored, capability(W))
        run(codes, scales, W, w.unit)
    else:
        made = four_bit(W.numel(), columns, w.nested_block, w.low_first, w.stored)
        made(codes, numbers, scales, *nested, W)


@dataclass(frozen=True)
class Stored:
    """A weight as kernels take it.

    - ``tensors``: codes; their numbers, None of 8-bit ones; scales; and of nested ones their map, the
      scales of their blocks and the offset, or None;
    - ``block``: the rows and columns that a scale is of, (1, 0) of whole rows, (0, 0) of all; of 4-bit
      codes the elements, as columns;
    - ``stored``: the name of the dtype that W is rounded to first.
    """

    tensors: tuple[Tensor | None, ...]
    block: tuple[int, int]
    stored: str
    nested_block: int | None = None
    low_first: bool = False
    unit: float = 1.0
    scales_in_row: int = 0


def stored_in(weight: Weight) -> Stored:
    """What kernels take of a quantized weight."""
    assert isinstance(weight, FourBit | EightBit | MXFP4)
    stored = str(weight.stored_dtype).removeprefix("torch.")
    t = weight.tensors()
    tensors: tuple[Tensor | None, ...]
    if isinstance(weight, EightBit):
        codes = t["weight"].view(torch.int8 if isinstance(weight, Int8) else torch.uint8)
        block, in_row = weight.block or (int(weight.scale.numel() != 1), 0), 0
        if weight.block is not None:
            in_row = weight.scale.shape[1]
        tensors = (codes, None, weight.scale, None, None, None)
        return Stored(tensors, block, stored, unit=weight.unit, scales_in_row=in_row)
    if isinstance(weight, MXFP4):
        codes = t["blocks"]
        tensors = (codes, codebook(E2M1, codes), t["scales"], None, None, None)
        return Stored(tensors, (1, BLOCK), stored, low_first=True)
    codes = t["weight"].view(torch.uint8)
    of_blocks, numbers, offset = (t.get(name) for name in NESTED)
    tensors = (codes, codebook(weight.numbers, codes), t["absmax"], numbers, of_blocks, offset)
    return Stored(tensors, (1, weight.block), stored, weight.nested_block)


@functools.lru_cache(maxsize=KEPT)
def four_bit(
    size: int, block: int, nested_block: int | None, low_first: bool, stored: str
) -> Callable[..., None]:
    """What launches it: of ``codes, numbers, scales, map, of_blocks, offset, W``, where the three before
    the last are those of nested scales, or None."""
    start = Start(four_bit_kernel, (_programs(size),), OPTIONS)

    def run(*tensors: Tensor | None) -> None:
        start(
            key_of(tensors=tensors), *tensors, size, (size + 1) // 2,
            block, nested_block, low_first, stored, GROUPS, PER_GROUP, INTERPRETED,
        )  # fmt: skip

    return run


@functools.lru_cache(maxsize=KEPT)
def eight_bit(
    shape: tuple[int, int], rows: int, columns: int, stored: str, sm: int
) -> Callable[[Tensor, Tensor, Tensor, float], None]:
    """What launches it: of ``codes, scale, W, unit``."""
    N, K = shape
    start = Start(eight_bit_kernel, (_programs(N * K),), OPTIONS)
    alike = K % PER_GROUP == 0 and columns % PER_GROUP == 0
    in_row = -(-K // columns) if columns else 0
    hardware = sm >= CONVERTS_E4M3 and not INTERPRETED

    def run(codes: Tensor, scale: Tensor, W: Tensor, unit: float) -> None:
        start(
            key_of(tensors=(codes, scale, W)), codes, scale, W, N * K, K, unit, in_row,
            rows, columns, alike, hardware, stored, GROUPS, PER_GROUP, INTERPRETED,
        )  # fmt: skip

    return run


def _programs(size: int) -> int:
    return -(-size // (GROUPS * PER_GROUP))
