"""``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias`` in one accumulator.

The low-rank term is the last K-step of the GEMM, so that nothing waits for ``s``; under a
dropout mask, which falls on it alone, it is added part by part when the tile is written.

As many programs as the device runs at once go through the tiles. Where the tiles are fewer than those,
K is cut too: each program leaves a float32 partial sum, the last one of a tile adds them up in order.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from lorafast.kernels.common.bundles import Mask, Matrix, Vector
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
    finish,
    multiply,
    takes_tma,
    tile_at,
    tiles_of,
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
    N_MAJOR: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
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
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), flatten=FLATTEN):
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
        acc = multiply(
            x, w, row_block, col_block, begin, end, M, N, K,
            BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS, N_MAJOR, WARP_SPECIALIZE,
            PRECISION, INTERPRETED,
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
                acc = add_low_rank(
                    acc, s, b, rows, cols, M, N, r, scaling,
                    BLOCK_R, RANK_BLOCKS, PRECISION, INTERPRETED,
                )  # fmt: skip
            finish(
                acc, y, s, b, bias, mask, row_block, col_block * BLOCK_N, M, N, r, scaling,
                BLOCK_R, RANK_BLOCKS, PARTS, DESCRIPTORS, PRECISION, INTERPRETED,
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
    """``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias``; with ``transposed``, ``x·W`` in place of ``x·Wᵀ``.

    Shapes: ``x [M, K]``, ``weight [N, K]``, ``s [M, r]``, ``lora_B [N, r]``, ``bias [N]`` →
    ``y [M, N]``, in the dtype of ``x``; with ``transposed``, ``weight [K, N]``.
    """
    M, K = x.shape
    N, r = lora_B.shape
    y = torch.empty((M, N), device=x.device, dtype=x.dtype)
    if y.numel() == 0:
        return y
    c = config or config_for(
        "linear_expand", x, M, K, N, r, adapter_dtype=lora_B.dtype,
        masked=dropout_p > 0.0, transposed=transposed, bulk=takes_tma(x, weight, transposed),
    )  # fmt: skip
    tiles = triton.cdiv(M, c.block_m) * triton.cdiv(N, c.block_n)
    splits = split_k(processors(x), tiles, triton.cdiv(K, c.block_k))
    split = splits > 1
    if split:
        c = dataclasses.replace(c, flatten=False)  # what follows the main loop is too much for it
    of_tiles = tiles_of(x, weight, y, r, transposed, dropout_p > 0.0, c)
    stride_wn, stride_wk = reversed(weight.stride()) if transposed else weight.stride()
    with on_device(x):
        linear_expand_kernel[(min(tiles * splits, processors(x) * c.ctas_per_sm),)](
            x=of_tiles.x,
            w=of_tiles.w,
            y=of_tiles.y,
            s_ptr=s,
            b_ptr=lora_B,
            bias_ptr=bias,
            partials_ptr=x.new_empty((splits, M, N), dtype=torch.float32) if split else None,
            counters_ptr=counters(x, tiles) if split else None,
            M=M,
            N=N,
            K=K,
            r=r,
            splits=splits,
            scaling=float(scaling),
            stride_xm=x.stride(0),
            stride_xk=x.stride(1),
            stride_wn=stride_wn,
            stride_wk=stride_wk,
            stride_sm=s.stride(0),
            stride_sr=s.stride(1),
            stride_bn=lora_B.stride(0),
            stride_br=lora_B.stride(1),
            stride_bias=None if bias is None else bias.stride(0),
            PRECISION=precision(x),
            INTERPRETED=INTERPRETED,
            **of_tiles.constants,
            **dropout_arguments(dropout_p, seed),
        )
    return y
