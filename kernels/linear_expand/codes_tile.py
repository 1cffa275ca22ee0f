"""A tile of a product that reads W as codes: its main loop, and the scales that are left out of it.

A tile of W becomes numbers in registers, rounded as ``Operand.rows`` rounds them, and is multiplied at
once. Where a scale is of a whole row of W, or of all of it, codes are multiplied as the integers or
8-bit floats that they are, which every dtype holds exactly. Their scale follows: in y it multiplies the
sum, in dx the tile of dy, where that has few rows. So W isn't rounded at all; ``scales_apart`` says
where the contract allows it.
"""

import triton
import triton.language as tl
from lorafast.kernels.common.codes import (
    block_scales,
    e4m3_to_float,
    four_bit_numbers,
    int8_to_float,
    rounded,
)
from lorafast.kernels.common.device import cast, dot


@triton.jit
def tile_of_w(
    codes_ptr,
    numbers_ptr,
    scales_ptr,
    map_ptr,
    of_blocks_ptr,
    offset_ptr,
    unit,
    scales_in_row,
    first_row,
    first_col,
    rows_of_w,
    cols_of_w,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    LOW_FIRST: tl.constexpr,
    HARDWARE: tl.constexpr,
    GROUP: tl.constexpr,
    STORED: tl.constexpr,
    APART: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    dtype: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``W[first_row:, first_col:]``, [TILE_ROWS, TILE_COLS], 0 beyond W ``[rows_of_w, cols_of_w]``.

    APART: without its scales. NEIGHBOURS: whether threads have neighbours of a row, as ``int8_to_float``
    has it. Scale (i, j) is of BLOCK_ROWS × BLOCK_COLS elements, 0 of them for all; GROUP neighbours in a
    row have one scale, and a row is a multiple of that.
    """
    rows = first_row + tl.arange(0, TILE_ROWS)
    # 64 bits: W may have more than 2**31 elements.
    begin = rows.to(tl.int64)[:, None] * cols_of_w
    GROUPS: tl.constexpr = TILE_COLS // GROUP
    firsts = first_col + tl.arange(0, GROUPS) * GROUP
    inside = (rows < rows_of_w)[:, None] & (firsts < cols_of_w)[None, :]  # [TILE_ROWS, GROUPS]
    if numbers_ptr is not None:
        at = first_col // 2 + tl.arange(0, TILE_COLS // 2)
        codes = tl.load(
            codes_ptr + begin // 2 + at[None, :],
            mask=(rows < rows_of_w)[:, None] & (at < cols_of_w // 2)[None, :],
            other=0,
        )  # [TILE_ROWS, TILE_COLS / 2]
        numbers = four_bit_numbers(numbers_ptr, codes, LOW_FIRST, INTERPRETED)
        blocks = (begin + firsts[None, :]) // BLOCK_COLS
        scales = block_scales(
            scales_ptr,
            map_ptr,
            of_blocks_ptr,
            offset_ptr,
            blocks,
            inside,
            NESTED_BLOCK,
            INTERPRETED,
        )
    else:
        at = first_col + tl.arange(0, TILE_COLS)
        codes = tl.load(
            codes_ptr + begin + at[None, :],
            mask=(rows < rows_of_w)[:, None] & (at < cols_of_w)[None, :],
            other=0,
        )  # [TILE_ROWS, TILE_COLS]
        if codes_ptr.dtype.element_ty == tl.uint8:
            numbers = e4m3_to_float(codes, HARDWARE)
        else:
            numbers = int8_to_float(codes, NEIGHBOURS, INTERPRETED)
        if not APART:
            if BLOCK_ROWS == 0:
                blocks = rows[:, None] * 0 + firsts[None, :] * 0
            elif BLOCK_COLS == 0:
                blocks = rows[:, None] + firsts[None, :] * 0
            else:
                blocks = rows[:, None] // BLOCK_ROWS * scales_in_row + firsts[None, :] // BLOCK_COLS
            scales = tl.load(scales_ptr + blocks, mask=inside, other=0.0) * unit
    if APART:
        w = cast(numbers, dtype, INTERPRETED)
    else:
        # [TILE_ROWS, GROUPS, GROUP]
        w = tl.reshape(numbers, (TILE_ROWS, GROUPS, GROUP)) * scales[:, :, None]
        w = tl.reshape(rounded(w, STORED, dtype, INTERPRETED), (TILE_ROWS, TILE_COLS))
    return w


@triton.jit
def scales_of(scales_ptr, unit, rows, rows_of_w, BLOCK_ROWS: tl.constexpr):
    """The scales of ``rows`` of W, those that a tile was made without."""
    at = rows if BLOCK_ROWS == 1 else rows * 0
    return tl.load(scales_ptr + at, mask=rows < rows_of_w, other=0.0) * unit


@triton.jit
def multiply_codes(
    acc,
    x,
    codes_ptr,
    numbers_ptr,
    scales_ptr,
    map_ptr,
    of_blocks_ptr,
    offset_ptr,
    unit,
    scales_in_row,
    rows,
    first_col,
    begin,
    end,
    M,
    N,
    K,
    TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    LOW_FIRST: tl.constexpr,
    HARDWARE: tl.constexpr,
    GROUP: tl.constexpr,
    STORED: tl.constexpr,
    APART: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``acc + x·Wᵀ``, or TRANSPOSED ``acc + x·W``, for ``rows`` of x, a ``Matrix``, and BLOCK_N columns
    from ``first_col`` on, over the K blocks from begin to end. APART: as ``tile_of_w``."""
    dtype: tl.constexpr = x.ptr.dtype.element_ty
    # 64 bits: M·K may pass 2**31 elements.
    x_rows = x.ptr + rows.to(tl.int64)[:, None] * x.stride_row  # [BLOCK_M, 1]
    for block in tl.range(begin, end):
        depth = block * BLOCK_K + tl.arange(0, BLOCK_K)
        x_tile = tl.load(
            x_rows + depth.to(tl.int64)[None, :] * x.stride_col,
            mask=(rows < M)[:, None] & (depth < K)[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
        if TRANSPOSED:
            w_tile = tile_of_w(
                codes_ptr, numbers_ptr, scales_ptr, map_ptr, of_blocks_ptr, offset_ptr, unit,
                scales_in_row, block * BLOCK_K, first_col, K, N, BLOCK_K, BLOCK_N,
                BLOCK_ROWS, BLOCK_COLS, NESTED_BLOCK, LOW_FIRST, HARDWARE, GROUP, STORED, APART,
                False, dtype, INTERPRETED,
            )  # fmt: skip
            if APART and BLOCK_ROWS == 1:
                scales = scales_of(scales_ptr, unit, depth, K, BLOCK_ROWS)
                x_tile = cast(x_tile.to(tl.float32) * scales[None, :], dtype, INTERPRETED)
        else:
            w_tile = tl.trans(
                tile_of_w(
                    codes_ptr, numbers_ptr, scales_ptr, map_ptr, of_blocks_ptr, offset_ptr, unit,
                    scales_in_row, first_col, block * BLOCK_K, N, K, BLOCK_N, BLOCK_K,
                    BLOCK_ROWS, BLOCK_COLS, NESTED_BLOCK, LOW_FIRST, HARDWARE, GROUP, STORED, APART,
                    True, dtype, INTERPRETED,
                )
            )  # fmt: skip
        acc = dot(x_tile, w_tile, acc, PRECISION, INTERPRETED)
    return acc


@triton.jit
def scale_columns(
    acc, scales_ptr, unit, cols, N, TRANSPOSED: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """A sum that was made APART, with the scales that it lacks: those of rows of W if they are its
    columns, or the one of all of W."""
    if not TRANSPOSED or BLOCK_ROWS == 0:
        acc *= scales_of(scales_ptr, unit, cols, N, BLOCK_ROWS)[None, :]
    return acc
