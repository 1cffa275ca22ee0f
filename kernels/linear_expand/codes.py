"""``y = x·Wᵀ + scaling · s·Bᵀ + bias`` for few rows, W read as the codes it is stored in.

A tile of W becomes numbers in registers, rounded as ``Operand.rows`` rounds them, and is multiplied at
once: no dense W is written. Each row block makes W's numbers again, so this is for few of them. Where
tiles are few K is cut: a program leaves a float32 partial sum, the last one of a tile adds them up in
order.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from lorafast.kernels.common.bundles import Matrix, Vector
from lorafast.kernels.common.codes import (
    block_scales,
    e4m3_to_float,
    four_bit_numbers,
    int8_to_float,
    rounded,
)
from lorafast.kernels.common.codes_plan import CodesLaunch
from lorafast.kernels.common.counters import counters
from lorafast.kernels.common.device import arrive, dot, sum_blocks
from lorafast.kernels.common.launch import INTERPRETED, KEPT, capability, on_its_device
from lorafast.kernels.common.start import Start, key_of
from lorafast.kernels.dequantize.kernel import CONVERTS_E4M3, stored_in
from lorafast.kernels.linear_expand.tile import add_low_rank, finish
from torch import Tensor

from lorafast.operands import Weight


@triton.jit
def _tile_of_w(
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
    NEIGHBOURS: tl.constexpr,
    dtype: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``W[first_row:, first_col:]``, [TILE_ROWS, TILE_COLS], 0 beyond W ``[rows_of_w, cols_of_w]``.

    NEIGHBOURS: whether threads have neighbours of a row, as ``int8_to_float`` has it.
    Scale (i, j) is of BLOCK_ROWS × BLOCK_COLS elements, 0 of them for all; GROUP neighbours in a row
    have one scale, and a row is a multiple of that.
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
        if BLOCK_ROWS == 0:
            blocks = rows[:, None] * 0 + firsts[None, :] * 0
        elif BLOCK_COLS == 0:
            blocks = rows[:, None] + firsts[None, :] * 0
        else:
            blocks = rows[:, None] // BLOCK_ROWS * scales_in_row + firsts[None, :] // BLOCK_COLS
        scales = tl.load(scales_ptr + blocks, mask=inside, other=0.0) * unit
    # [TILE_ROWS, GROUPS, GROUP]
    w = tl.reshape(numbers, (TILE_ROWS, GROUPS, GROUP)) * scales[:, :, None]
    w = rounded(w, STORED, dtype, INTERPRETED)
    return tl.reshape(w, (TILE_ROWS, TILE_COLS))


@triton.jit(do_not_specialize=["M", "splits", "scales_in_row"])
def codes_linear_expand_kernel(
    x_ptr,
    codes_ptr,
    numbers_ptr,
    scales_ptr,
    map_ptr,
    of_blocks_ptr,
    offset_ptr,
    y_ptr,
    s_ptr,
    b_ptr,
    bias_ptr,
    partials_ptr,
    counters_ptr,
    M,
    N,
    K,
    r,
    splits,
    scales_in_row,
    unit,
    scaling,
    stride_xm,
    stride_xk,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    stride_bias,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    LOW_FIRST: tl.constexpr,
    HARDWARE: tl.constexpr,
    GROUP: tl.constexpr,
    STORED: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program p: share p % splits of tile p // splits; of neighbours the row blocks differ."""
    s = Matrix(s_ptr, stride_sm, stride_sr)
    b = Matrix(b_ptr, stride_bn, stride_br)
    bias = Vector(bias_ptr, stride_bias) if bias_ptr is not None else None
    tile = tl.program_id(0) // splits
    share = tl.program_id(0) % splits
    row_block = tile % tl.cdiv(M, BLOCK_M)
    col_block = tile // tl.cdiv(M, BLOCK_M)
    k_blocks = tl.cdiv(K, BLOCK_K)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
    # 64 bits: M·K may pass 2**31 elements.
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_xm  # [BLOCK_M, 1]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in tl.range(k_blocks * share // splits, k_blocks * (share + 1) // splits):
        depth = block * BLOCK_K + tl.arange(0, BLOCK_K)
        x_tile = tl.load(
            x_rows + depth.to(tl.int64)[None, :] * stride_xk,
            mask=(rows < M)[:, None] & (depth < K)[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
        if TRANSPOSED:
            w_tile = _tile_of_w(
                codes_ptr, numbers_ptr, scales_ptr, map_ptr, of_blocks_ptr, offset_ptr, unit,
                scales_in_row, block * BLOCK_K, col_block * BLOCK_N, K, N, BLOCK_K, BLOCK_N,
                BLOCK_ROWS, BLOCK_COLS, NESTED_BLOCK, LOW_FIRST, HARDWARE, GROUP, STORED,
                False, x_ptr.dtype.element_ty, INTERPRETED,
            )  # fmt: skip
        else:
            w_tile = tl.trans(
                _tile_of_w(
                    codes_ptr, numbers_ptr, scales_ptr, map_ptr, of_blocks_ptr, offset_ptr, unit,
                    scales_in_row, col_block * BLOCK_N, block * BLOCK_K, N, K, BLOCK_N, BLOCK_K,
                    BLOCK_ROWS, BLOCK_COLS, NESTED_BLOCK, LOW_FIRST, HARDWARE, GROUP, STORED,
                    True, x_ptr.dtype.element_ty, INTERPRETED,
                )
            )  # fmt: skip
        acc = dot(x_tile, w_tile, acc, PRECISION, INTERPRETED)
    last = True
    if partials_ptr is not None:
        offsets = rows.to(tl.int64)[:, None] * N + cols[None, :]  # [BLOCK_M, BLOCK_N]
        inside = (rows < M)[:, None] & (cols < N)[None, :]
        size = tl.cast(M, tl.int64) * N
        tl.store(partials_ptr + share * size + offsets, acc, mask=inside)
        last = arrive(counters_ptr + tile) == splits - 1
        if last:
            acc = sum_blocks(partials_ptr, offsets, inside, size, splits)
            tl.store(counters_ptr + tile, 0)
    if last:
        acc = add_low_rank(
            acc, s, b, rows, cols, M, N, r, scaling, BLOCK_R, 0, PRECISION, INTERPRETED
        )
        finish(acc, y_ptr, bias, row_block, col_block * BLOCK_N, M, N, 1, False, INTERPRETED)


@functools.lru_cache(maxsize=KEPT)
def launcher(launch: CodesLaunch) -> Callable[..., Tensor]:
    """What launches it: of ``x, weight, s, lora_B, scaling, bias, dropout_p, seed``, the last three
    optional, and without a mask."""
    c, M, K, N, r = launch.config, launch.M, launch.K, launch.N, launch.r
    start = Start(codes_linear_expand_kernel, (launch.tiles * launch.splits,), c.options)

    @on_its_device
    def run(
        x: Tensor,
        weight: Weight,
        s: Tensor,
        lora_B: Tensor,
        scaling: float,
        bias: Tensor | None = None,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> Tensor:
        y = torch.empty((M, N), dtype=x.dtype, device=x.device)
        if not M * N:
            return y
        partials = used = None
        if launch.splits > 1:
            partials = torch.empty((launch.splits, M, N), dtype=torch.float32, device=x.device)
            used = counters(x, launch.tiles)
        w = stored_in(weight)
        hardware = capability(x) >= CONVERTS_E4M3 and not INTERPRETED
        strides = (
            *x.stride(), *s.stride(), *lora_B.stride(), None if bias is None else bias.stride(0),
        )  # fmt: skip
        blocks = (*w.block, w.nested_block, w.low_first, hardware, launch.group, w.stored)
        start(
            key_of(strides, blocks, w.scales_in_row, tensors=(x, *w.tensors, s, lora_B, bias)),
            x, *w.tensors, y, s, lora_B, bias, partials, used, M, N, K, r, launch.splits,
            w.scales_in_row, w.unit, float(scaling), *strides, launch.transposed,
            c.block_m, c.block_n, c.block_k, c.block_r, *blocks, launch.precision, INTERPRETED,
        )  # fmt: skip
        return y

    return run
