"""``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias`` in one accumulator.

The low-rank product is the last K-step of the base product, so that nothing waits for ``s``; under a
dropout mask, which falls on it alone, it is added part by part when the tile is written.

As many programs as the device runs at once go through the tiles. Where the tiles are fewer than those,
K is cut too: each program leaves a float32 partial sum, the last one of a tile adds them up in order.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from lorafast.kernels.common.configs import LaunchConfig, split_k
from lorafast.kernels.common.counters import counters
from lorafast.kernels.common.device import arrive, sum_blocks
from lorafast.kernels.common.launch import (
    INTERPRETED,
    config_for,
    dropout_arguments,
    on_device,
    precision,
    processors,
)
from lorafast.kernels.linear_expand.tile import (
    add_low_rank,
    bulk_copies,
    finish,
    multiply,
    tile_arguments,
    tile_at,
)
from torch import Tensor


@triton.jit(do_not_specialize=["M", "r", "splits", "threshold"])
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
    TRANSPOSED: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    FLATTEN: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program p takes items p, p + programs, …; an item is a tile, or one of ``splits`` shares of it."""
    items = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N) * splits
    k_blocks = tl.cdiv(K, BLOCK_K)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), flatten=FLATTEN):
        if SPLIT:
            tile = item // splits
            share = item % splits
            begin = k_blocks * share // splits
            end = k_blocks * (share + 1) // splits
        else:
            tile = item
            begin = 0
            end = k_blocks
        row_block, col_block = tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = multiply(
            x, w, row_block, col_block, begin, end, M, N, K,
            stride_xm, stride_xk, stride_wn, stride_wk,
            BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS, TRANSPOSED, WARP_SPECIALIZE,
            PRECISION, INTERPRETED,
        )  # fmt: skip
        rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
        last = True
        if SPLIT:
            offsets = rows.to(tl.int64)[:, None] * N + cols[None, :]  # [BLOCK_M, BLOCK_N]
            inside = (rows < M)[:, None] & (cols < N)[None, :]
            size = tl.cast(M, tl.int64) * N
            tl.store(partials_ptr + share * size + offsets, acc, mask=inside)
            last = arrive(counters_ptr + tile) == splits - 1
            if last:
                acc = sum_blocks(partials_ptr, offsets, inside, size, splits)
                tl.store(counters_ptr + tile, 0)
        if last:
            if not HAS_DROPOUT:
                acc = add_low_rank(
                    acc, s_ptr, b_ptr, rows, cols, M, N, r, scaling,
                    stride_sm, stride_sr, stride_bn, stride_br,
                    BLOCK_R, RANK_BLOCKS, PRECISION, INTERPRETED,
                )  # fmt: skip
            finish(
                acc, y, s_ptr, b_ptr, bias_ptr, seed_ptr, row_block, col_block * BLOCK_N, M, N, r,
                threshold, scaling, survivor_scale,
                stride_sm, stride_sr, stride_bn, stride_br, stride_bias,
                BLOCK_R, RANK_BLOCKS, PARTS, DESCRIPTORS, HAS_BIAS, HAS_DROPOUT, PRECISION, INTERPRETED,
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
    config: LaunchConfig | None = None,
) -> Tensor:
    """``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias``.

    Shapes: ``x [M, K]``, ``weight [N, K]``, ``s [M, r]``, ``lora_B [N, r]``, ``bias [N]`` →
    ``y [M, N]``, in the dtype of ``x``.
    """
    M, K = x.shape
    N, r = lora_B.shape
    y = torch.empty((M, N), device=x.device, dtype=x.dtype)
    if y.numel() == 0:
        return y
    c = config or config_for(
        "linear_expand", x, M, K, N, r, adapter_dtype=lora_B.dtype,
        masked=dropout_p > 0.0, transposed=weight.stride(1) != 1, bulk=bulk_copies(x, weight),
    )  # fmt: skip
    tiles = triton.cdiv(M, c.block_m) * triton.cdiv(N, c.block_n)
    splits = split_k(processors(x), tiles, triton.cdiv(K, c.block_k))
    split = splits > 1
    if split:
        c = dataclasses.replace(c, flatten=False)  # what follows the main loop is too much for it
    with on_device(x):
        linear_expand_kernel[(min(tiles * splits, processors(x) * c.ctas_per_sm),)](
            s_ptr=s,
            b_ptr=lora_B,
            bias_ptr=x if bias is None else bias,
            partials_ptr=x.new_empty((splits, M, N), dtype=torch.float32) if split else x,
            counters_ptr=counters(x, tiles) if split else x,
            M=M,
            N=N,
            K=K,
            r=r,
            splits=splits,
            scaling=float(scaling),
            stride_sm=s.stride(0),
            stride_sr=s.stride(1),
            stride_bn=lora_B.stride(0),
            stride_br=lora_B.stride(1),
            stride_bias=1 if bias is None else bias.stride(0),
            SPLIT=split,
            HAS_BIAS=bias is not None,
            PRECISION=precision(x),
            INTERPRETED=INTERPRETED,
            **tile_arguments(x, weight, y, r, dropout_p > 0.0, c),
            **dropout_arguments(x, dropout_p, seed),
        )
    return y
