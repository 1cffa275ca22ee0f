"""``dA = dsᵀ·drop(x)``: one pass over x, rows shared out over programs, partial sums in float32."""

import torch
import triton
import triton.language as tl
from lorafast.kernels.common.configs import LaunchConfig, chunks, config_for
from lorafast.kernels.common.device import cast, dot, keep_mask
from lorafast.kernels.common.launch import (
    INTERPRETED,
    dropout_arguments,
    on_device,
    precision,
    processors,
)
from lorafast.kernels.common.sum_partials import sum_partials
from torch import Tensor


@triton.jit(do_not_specialize=["M", "r", "m_blocks", "threshold"])
def shrink_backward_kernel(
    ds_ptr,
    x_ptr,
    da_ptr,
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
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program (i, j, l): column block i of x, row chunk j, rank block l."""
    first_col = tl.program_id(0) * BLOCK_K
    chunk = tl.program_id(1)
    cols = first_col + tl.arange(0, BLOCK_K)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    # 64 bits: M·K may pass 2**31 elements.
    x_cols = x_ptr + cols.to(tl.int64)[None, :] * stride_xk  # [1, BLOCK_K]
    ds_ranks = ds_ptr + ranks.to(tl.int64)[:, None] * stride_dsr  # [BLOCK_R, 1]
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    acc = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    begin = chunk * m_blocks * BLOCK_M
    end = tl.minimum(begin + m_blocks * BLOCK_M, M)
    for m in range(begin, end, BLOCK_M):
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
            kept = tl.where(keep, x.to(tl.float32) * survivor_scale, 0.0)
            x = cast(kept, x.dtype, INTERPRETED)
        acc = dot(ds, x, acc, PRECISION, INTERPRETED)

    start = chunk.to(tl.int64) * r * K  # which partial; the only one is dA itself
    da_ptrs = da_ptr + start + ranks.to(tl.int64)[:, None] * K + cols[None, :]
    inside = (ranks < r)[:, None] & (cols < K)[None, :]  # [BLOCK_R, BLOCK_K]
    tl.store(da_ptrs, cast(acc, da_ptr.dtype.element_ty, INTERPRETED), mask=inside)


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
    c = config or config_for("shrink_backward", r, x.element_size())
    col_blocks, rank_blocks = triton.cdiv(K, c.block_k), triton.cdiv(r, c.block_r)
    count, m_blocks = chunks(processors(x), M, c.block_m, col_blocks * rank_blocks)
    dA = torch.empty((r, K), device=x.device, dtype=dtype)
    # Partial sums stay in float32 until the last addition.
    target = dA if count == 1 else dA.new_empty((count, r, K), dtype=torch.float32)
    with on_device(x):
        shrink_backward_kernel[(col_blocks, count, rank_blocks)](
            ds,
            x,
            target,
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
            PRECISION=precision(x),
            INTERPRETED=INTERPRETED,
            **c.options,
            **dropout_arguments(x, dropout_p, seed),
        )
        return dA if count == 1 else sum_partials(target, dtype)
