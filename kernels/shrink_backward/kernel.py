"""``dA = dsᵀ·drop(x)``: one pass over x, its rows shared out over programs.

Each leaves a partial sum in float32; the last one of a column block adds them up in a fixed order.
"""

import torch
import triton
import triton.language as tl
from lorafast.kernels.common.configs import LaunchConfig, chunks
from lorafast.kernels.common.counters import counters
from lorafast.kernels.common.device import (
    arrive,
    cast,
    drop,
    keep_mask,
    low_rank_dot,
    scale_sum,
    sum_blocks,
)
from lorafast.kernels.common.launch import (
    INTERPRETED,
    config_for,
    dropout_arguments,
    on_device,
    precision,
    processors,
)
from torch import Tensor


@triton.jit
def shrink_backward_columns(
    ds_ptr,
    x_ptr,
    seed_ptr,
    first_col,
    ranks,
    begin,
    end,
    K,
    r,
    threshold,
    survivor_scale,
    stride_dsm,
    stride_dsr,
    stride_xm,
    stride_xk,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``dsᵀ·drop(x)`` in float32 for ``ranks`` and BLOCK_K columns, over the rows from begin to end."""
    cols = first_col + tl.arange(0, BLOCK_K)
    # 64 bits: M·K may pass 2**31 elements.
    x_cols = x_ptr + cols.to(tl.int64)[None, :] * stride_xk  # [1, BLOCK_K]
    ds_ranks = ds_ptr + ranks.to(tl.int64)[:, None] * stride_dsr  # [BLOCK_R, 1]
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((ranks.shape[0], BLOCK_K), dtype=tl.float32)
    for m in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        rows = m + tl.arange(0, BLOCK_M)
        offsets = rows.to(tl.int64)
        x = tl.load(
            x_cols + offsets[:, None] * stride_xm,
            mask=(rows < end)[:, None] & (cols < K)[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
        ds = tl.load(
            ds_ranks + offsets[None, :] * stride_dsm,
            mask=(ranks < r)[:, None] & (rows < end)[None, :],
            other=0.0,
        )  # [BLOCK_R, BLOCK_M]
        if HAS_DROPOUT:
            keep = keep_mask(seed, rows, first_col, K, threshold, BLOCK_K)
            x = drop(x, keep, survivor_scale, INTERPRETED)
        acc = low_rank_dot(ds, x, acc, PRECISION, INTERPRETED)
    return scale_sum(acc, x_ptr.dtype.element_ty, survivor_scale, HAS_DROPOUT)


@triton.jit(do_not_specialize=["M", "r", "m_blocks", "threshold"])
def shrink_backward_kernel(
    ds_ptr,
    x_ptr,
    da_ptr,
    partials_ptr,
    counters_ptr,
    seed_ptr,
    M,
    K,
    r,
    m_blocks,
    threshold,
    survivor_scale,
    stride_dsm,
    stride_dsr,
    stride_xm,
    stride_xk,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program (i, j, l): column block i of x, row chunk j, rank block l."""
    first_col = tl.program_id(0) * BLOCK_K
    chunk = tl.program_id(1)
    cols = first_col + tl.arange(0, BLOCK_K)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    # Counted in blocks, so that the compiler knows the alignment of every load.
    begin = chunk * m_blocks * BLOCK_M
    end = tl.minimum(begin + m_blocks * BLOCK_M, M)
    acc = shrink_backward_columns(
        ds_ptr, x_ptr, seed_ptr, first_col, ranks, begin, end, K, r, threshold, survivor_scale,
        stride_dsm, stride_dsr, stride_xm, stride_xk,
        BLOCK_M, BLOCK_K, STAGES, HAS_DROPOUT, PRECISION, INTERPRETED,
    )  # fmt: skip
    offsets = ranks.to(tl.int64)[:, None] * K + cols[None, :]  # [BLOCK_R, BLOCK_K]
    inside = (ranks < r)[:, None] & (cols < K)[None, :]
    if SPLIT:
        size = tl.cast(K, tl.int64) * r
        tl.store(partials_ptr + chunk * size + offsets, acc, mask=inside)
        counter = counters_ptr + tl.program_id(0) * tl.num_programs(2) + tl.program_id(2)
        if arrive(counter) == tl.num_programs(1) - 1:
            acc = sum_blocks(partials_ptr, offsets, inside, size, tl.num_programs(1))
            tl.store(da_ptr + offsets, cast(acc, da_ptr.dtype.element_ty, INTERPRETED), mask=inside)
            tl.store(counter, 0)
    else:
        tl.store(da_ptr + offsets, cast(acc, da_ptr.dtype.element_ty, INTERPRETED), mask=inside)


def shrink_backward(
    ds: Tensor,
    x: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dtype: torch.dtype | None = None,
    *,
    config: LaunchConfig | None = None,
) -> Tensor:
    """``dA = dsᵀ·drop(x)``.

    Shapes: ``ds [M, r]``, ``x [M, K]`` → ``dA [r, K]`` in ``dtype`` (that of ``x`` if None).
    """
    M, K = x.shape
    r = ds.shape[1]
    dtype = dtype or x.dtype
    if x.numel() == 0:
        return torch.zeros((r, K), device=x.device, dtype=dtype)
    c = config or config_for("shrink_backward", x, M, K, K, r, masked=dropout_p > 0.0)
    col_blocks, rank_blocks = triton.cdiv(K, c.block_k), triton.cdiv(r, c.block_r)
    count, m_blocks = chunks(processors(x) * c.ctas_per_sm, M, c.block_m, col_blocks * rank_blocks)
    split = count > 1
    dA = torch.empty((r, K), device=x.device, dtype=dtype)
    with on_device(x):
        shrink_backward_kernel[(col_blocks, count, rank_blocks)](
            ds,
            x,
            dA,
            x.new_empty((count, r, K), dtype=torch.float32) if split else x,
            counters(x, col_blocks * rank_blocks) if split else x,
            M=M,
            K=K,
            r=r,
            m_blocks=m_blocks,
            stride_dsm=ds.stride(0),
            stride_dsr=ds.stride(1),
            stride_xm=x.stride(0),
            stride_xk=x.stride(1),
            BLOCK_M=c.block_m,
            BLOCK_K=c.block_k,
            BLOCK_R=c.block_r,
            STAGES=c.num_stages,
            SPLIT=split,
            PRECISION=precision(x),
            INTERPRETED=INTERPRETED,
            **c.options,
            **dropout_arguments(x, dropout_p, seed),
        )
    return dA
