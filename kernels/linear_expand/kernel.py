"""``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias`` in one accumulator.

The low-rank term is the last K-step of the GEMM, so that nothing waits for ``s``; under a
dropout mask, which falls on it alone, it is the first, and the GEMM is added to it.

As many programs as the device runs at once go through the tiles. Where the tiles are fewer than those,
K is cut too: each program leaves a float32 partial sum, the last one of a tile adds them up in order.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from lorafast.kernels.common.bundles import Mask, Matrix, Vector
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.counters import counters
from lorafast.kernels.common.device import arrive, end_block, sum_blocks
from lorafast.kernels.common.launch import (
    INTERPRETED,
    KEPT,
    NO_MASK,
    mask_of,
    on_its_device,
    precision,
    rule_for,
    sms,
)
from lorafast.kernels.common.plan import LinearExpandLaunch, linear_expand_launch, tma_fits
from lorafast.kernels.common.start import Start, key_of
from lorafast.kernels.linear_expand.tile import (
    add_low_rank,
    blocks_of,
    finish,
    masked_low_rank,
    multiply,
    operands_of,
    tile_at,
)
from torch import Tensor

from lorafast.core.problem import Layout


@triton.jit(do_not_specialize=["M", "splits", "threshold"])
def linear_expand_kernel(
    x,
    w,
    y,
    s_ptr,
    b_ptr,
    bias_ptr,
    seed_ptr,
    partials_ptr,
    counters_ptr,
    M,
    N,
    K,
    r,
    splits,
    threshold,
    scaling,
    survivor_scale,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    stride_bias,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    N_MAJOR: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program p takes items p, p + programs, …; an item is a tile, or one of ``splits`` shares of it."""
    s = Matrix(s_ptr, stride_sm, stride_sr)
    b = Matrix(b_ptr, stride_bn, stride_br)
    bias = Vector(bias_ptr, stride_bias) if bias_ptr is not None else None
    mask = Mask(seed_ptr, threshold, survivor_scale) if seed_ptr is not None else None
    if not DESCRIPTORS:
        x = Matrix(x, stride_xm, stride_xk)
        w = Matrix(w, stride_wn, stride_wk)
    items = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N) * splits
    k_blocks = tl.cdiv(K, BLOCK_K)
    for item in tl.range(
        tl.program_id(0), items, tl.num_programs(0), flatten=FLATTEN,
        # What a mask takes would spill in the main loop, where pointers take many registers.
        disable_licm=seed_ptr is not None and not DESCRIPTORS,
    ):  # fmt: skip
        if partials_ptr is not None:
            tile = item // splits
            share = item % splits
            begin = k_blocks * share // splits
            end = k_blocks * (share + 1) // splits
        else:
            tile = item
            begin = 0
            end = k_blocks
        row_block, col_block = tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        if mask is not None:
            # Of the shares of a tile the first has the low-rank term: to the others there are no ranks.
            ranks = r * (share == 0).to(tl.int32) if partials_ptr is not None else r
            acc = masked_low_rank(
                s, b, mask, row_block, col_block, M, N, ranks, scaling,
                BLOCK_M, BLOCK_N, BLOCK_R, RANK_BLOCKS, PARTS, PRECISION, INTERPRETED,
            )  # fmt: skip
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        acc = multiply(
            acc, x, w, row_block, col_block, begin, end, M, N, K,
            BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS, N_MAJOR, PRECISION, INTERPRETED,
        )  # fmt: skip
        rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
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
            if mask is None:
                s_here = (
                    Matrix(s_ptr + end_block(s_ptr, INTERPRETED), stride_sm, stride_sr)
                    if FLATTEN
                    else s
                )
                acc = add_low_rank(
                    acc, s_here, b, rows, cols, M, N, r, scaling,
                    BLOCK_R, RANK_BLOCKS, PRECISION, INTERPRETED,
                )  # fmt: skip
            finish(
                acc, y, bias, row_block, col_block * BLOCK_N, M, N, PARTS, DESCRIPTORS, INTERPRETED,
            )  # fmt: skip


def linear_expand(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    transposed: bool = False,
    config: LaunchConfig | None = None,
) -> Tensor:
    """``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias``, with ``transposed`` of ``x·W``.

    Shapes: ``x [M, K]``, ``weight [N, K]``, ``s [M, r]``, ``lora_B [N, r]``, ``bias [N]`` →
    ``y [M, N]``, in the dtype of ``x``; with ``transposed``, ``weight [K, N]``.
    """
    (M, K), (N, r) = x.shape, lora_B.shape
    read = Layout.of(weight)
    tma = tma_fits(x.dtype, Layout.of(x), read, M, K, N)
    launch = linear_expand_launch(
        config or rule_for("linear_expand", x, M, K, N, r, tma), M, K, N, r,
        sms=sms(x), dtype=x.dtype, precision=precision(x), tma=tma, transposed=transposed,
        by_rows=read.rows > 0, bias=bias is not None, dropout=dropout_p > 0.0,
    )  # fmt: skip
    return launcher(launch)(x, weight, s, lora_B, scaling, bias, dropout_p, seed)


@functools.lru_cache(maxsize=KEPT)
def launcher(launch: LinearExpandLaunch) -> Callable[..., Tensor]:
    """What launches it: of ``x, weight, s, lora_B, scaling, bias, dropout_p, seed``, the last three
    optional."""
    M, N, K, r = launch.M, launch.N, launch.K, launch.r
    tiles, splits = launch.tiles, launch.splits
    start = Start(linear_expand_kernel, (launch.programs,), launch.config.options)
    operands = operands_of(launch)
    blocks = (*blocks_of(launch), launch.precision, INTERPRETED)

    @on_its_device
    def run(
        x: Tensor,
        weight: Tensor,
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
        if splits > 1:
            partials = torch.empty((splits, M, N), dtype=torch.float32, device=x.device)
            used = counters(x, tiles)
        seed, threshold, survivor_scale = mask_of(dropout_p, seed) if launch.dropout else NO_MASK
        of_w = weight.stride()
        strides = (
            *x.stride(), *(of_w[::-1] if launch.transposed else of_w), *s.stride(), *lora_B.stride(),
            None if bias is None else bias.stride(0),
        )  # fmt: skip
        start(
            key_of(strides, tensors=(x, weight, s, lora_B, bias, seed)),
            *operands(x, weight, y), s, lora_B, bias, seed, partials, used,
            M, N, K, r, splits, threshold, float(scaling), survivor_scale, *strides, *blocks,
        )  # fmt: skip
        return y

    return run
