"""``s = drop(x)·Aᵀ``: one pass over x, its columns shared out over programs where rows are few.

Where they are, each program leaves a partial sum, and the last one of a row block adds them up.
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
    factor,
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

from lorafast.reference import wide


@triton.jit
def shrink_rows(
    x_ptr,
    a_ptr,
    seed_ptr,
    rows,
    ranks,
    begin,
    end,
    M,
    K,
    r,
    threshold,
    survivor_scale,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``drop(x)·Aᵀ`` in float32 for ``rows`` and ``ranks``, over the columns from begin to end."""
    # 64 bits: M·K may pass 2**31 elements.
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_xm  # [BLOCK_M, 1]
    a_rows = a_ptr + ranks.to(tl.int64)[None, :] * stride_ar  # [1, BLOCK_R]
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((rows.shape[0], ranks.shape[0]), dtype=tl.float32)
    for k in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        cols = k + tl.arange(0, BLOCK_K)
        offsets = cols.to(tl.int64)
        x = tl.load(
            x_rows + offsets[None, :] * stride_xk,
            mask=(rows < M)[:, None] & (cols < end)[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
        a = tl.load(
            a_rows + offsets[:, None] * stride_ak,
            mask=(ranks < r)[None, :] & (cols < end)[:, None],
            other=0.0,
        )  # [BLOCK_K, BLOCK_R]
        if HAS_DROPOUT:
            keep = keep_mask(seed, rows, k, K, threshold, BLOCK_K)
            x = drop(x, keep, survivor_scale, INTERPRETED)
        acc = low_rank_dot(x, factor(a, x.dtype, INTERPRETED), acc, PRECISION, INTERPRETED)
    return scale_sum(acc, x_ptr.dtype.element_ty, survivor_scale, HAS_DROPOUT)


@triton.jit(do_not_specialize=["M", "r", "k_blocks", "threshold"])
def shrink_kernel(
    x_ptr,
    a_ptr,
    s_ptr,
    partials_ptr,
    counters_ptr,
    seed_ptr,
    M,
    K,
    r,
    k_blocks,
    threshold,
    survivor_scale,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program (i, j, l) shrinks row block i over column chunk j for rank block l."""
    chunk = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    # Counted in blocks, so that the compiler knows the alignment of every load.
    begin = chunk * k_blocks * BLOCK_K
    end = tl.minimum(begin + k_blocks * BLOCK_K, K)
    acc = shrink_rows(
        x_ptr, a_ptr, seed_ptr, rows, ranks, begin, end, M, K, r, threshold, survivor_scale,
        stride_xm, stride_xk, stride_ar, stride_ak,
        BLOCK_K, STAGES, HAS_DROPOUT, PRECISION, INTERPRETED,
    )  # fmt: skip
    offsets = rows.to(tl.int64)[:, None] * r + ranks[None, :]  # [BLOCK_M, BLOCK_R]
    inside = (rows < M)[:, None] & (ranks < r)[None, :]
    if SPLIT:
        size = tl.cast(M, tl.int64) * r
        tl.store(partials_ptr + chunk * size + offsets, acc, mask=inside)
        counter = counters_ptr + tl.program_id(0) * tl.num_programs(2) + tl.program_id(2)
        if arrive(counter) == tl.num_programs(1) - 1:
            acc = sum_blocks(partials_ptr, offsets, inside, size, tl.num_programs(1))
            tl.store(s_ptr + offsets, cast(acc, s_ptr.dtype.element_ty, INTERPRETED), mask=inside)
            tl.store(counter, 0)
    else:
        tl.store(s_ptr + offsets, cast(acc, s_ptr.dtype.element_ty, INTERPRETED), mask=inside)


def shrink(
    x: Tensor,
    lora_A: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    config: LaunchConfig | None = None,
) -> Tensor:
    """``s = drop(x)·Aᵀ``.

    Shapes: ``x [M, K]``, ``lora_A [r, K]`` → ``s [M, r]``, in the dtype of ``x`` (float32 for
    float16).
    """
    M, K = x.shape
    r = lora_A.shape[0]
    s = torch.empty((M, r), device=x.device, dtype=wide(x.dtype))
    if s.numel() == 0:
        return s
    c = config or config_for(
        "shrink", x, M, K, K, r, adapter_dtype=lora_A.dtype, masked=dropout_p > 0.0
    )
    row_blocks, rank_blocks = triton.cdiv(M, c.block_m), triton.cdiv(r, c.block_r)
    count, k_blocks = chunks(processors(x) * c.ctas_per_sm, K, c.block_k, row_blocks * rank_blocks)
    split = count > 1
    with on_device(x):
        shrink_kernel[(row_blocks, count, rank_blocks)](
            x,
            lora_A,
            s,
            x.new_empty((count, M, r), dtype=torch.float32) if split else x,
            counters(x, row_blocks * rank_blocks) if split else x,
            M=M,
            K=K,
            r=r,
            k_blocks=k_blocks,
            stride_xm=x.stride(0),
            stride_xk=x.stride(1),
            stride_ar=lora_A.stride(0),
            stride_ak=lora_A.stride(1),
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
    return s
