"""``y = x·Wᵀ + scaling · s·Bᵀ + bias`` for few rows, W read as the codes it is stored in.

A tile of W becomes numbers in registers and is multiplied at once (``codes_tile``): no dense W is
written. Each row block makes W's numbers again, so this is for few of them. Where tiles are few K is
cut: a program leaves a float32 partial sum, the last one of a tile adds them up in order.
"""

import functools
from collections.abc import Callable, Hashable

import torch
import triton
import triton.language as tl
from lorafast.kernels.common.bundles import Matrix, Vector
from lorafast.kernels.common.codes_plan import CodesLaunch, scales_apart
from lorafast.kernels.common.counters import counters
from lorafast.kernels.common.device import arrive, sum_blocks
from lorafast.kernels.common.launch import INTERPRETED, KEPT, capability, on_its_device
from lorafast.kernels.common.start import Start, key_of
from lorafast.kernels.dequantize.kernel import CONVERTS_E4M3, Stored, stored_in
from lorafast.kernels.linear_expand.codes_tile import multiply_codes, scale_columns
from lorafast.kernels.linear_expand.tile import add_low_rank, finish
from torch import Tensor

from lorafast.operands import Weight


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
    APART: tl.constexpr,
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
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = multiply_codes(
        acc, Matrix(x_ptr, stride_xm, stride_xk), codes_ptr, numbers_ptr, scales_ptr, map_ptr,
        of_blocks_ptr, offset_ptr, unit, scales_in_row, rows, col_block * BLOCK_N,
        k_blocks * share // splits, k_blocks * (share + 1) // splits, M, N, K,
        TRANSPOSED, BLOCK_N, BLOCK_K, BLOCK_ROWS, BLOCK_COLS, NESTED_BLOCK, LOW_FIRST, HARDWARE, GROUP,
        STORED, APART, PRECISION, INTERPRETED,
    )  # fmt: skip
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
        if APART:
            acc = scale_columns(acc, scales_ptr, unit, cols, N, TRANSPOSED, BLOCK_ROWS)
        acc = add_low_rank(
            acc, s, b, rows, cols, M, N, r, scaling, BLOCK_R, 0, PRECISION, INTERPRETED
        )
        finish(acc, y_ptr, bias, row_block, col_block * BLOCK_N, M, N, 1, False, INTERPRETED)


def constants_of(w: Stored, x: Tensor, group: int, rows_apart: bool = True) -> tuple[Hashable, ...]:
    """The compile-time constants of a product of ``x`` that reads codes, from BLOCK_ROWS to APART;
    ``rows_apart``: whether scales of rows of W may be left out of the main loop."""
    hardware = capability(x) >= CONVERTS_E4M3 and not INTERPRETED
    apart = scales_apart(w.block, w.stored, x.dtype) and (rows_apart or not w.block[0])
    return (*w.block, w.nested_block, w.low_first, hardware, group, w.stored, apart)


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
        strides = (
            *x.stride(), *s.stride(), *lora_B.stride(), None if bias is None else bias.stride(0),
        )  # fmt: skip
        blocks = constants_of(w, x, launch.group, not launch.transposed or launch.folds)
        start(
            key_of(strides, blocks, w.scales_in_row, tensors=(x, *w.tensors, s, lora_B, bias)),
            x, *w.tensors, y, s, lora_B, bias, partials, used, M, N, K, r, launch.splits,
            w.scales_in_row, w.unit, float(scaling), *strides, launch.transposed,
            c.block_m, c.block_n, c.block_k, c.block_r, *blocks, launch.precision, INTERPRETED,
        )  # fmt: skip
        return y

    return run
