"""``s = drop(x)·Aᵀ``: one pass over x, its columns shared out over programs where rows are few."""

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


@triton.jit(do_not_specialize=["M", "r", "k_blocks", "threshold"])
def shrink_kernel(
    x_ptr,
    a_ptr,
    s_ptr,
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
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program (i, j, l) shrinks row block i over column chunk j for rank block l."""
    chunk = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    # 64 bits: M·K may pass 2**31 elements.
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_xm  # [BLOCK_M, 1]
    a_rows = a_ptr + ranks.to(tl.int64)[None, :] * stride_ar  # [1, BLOCK_R]
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    # Counted in blocks, so that the compiler knows the alignment of every load.
    begin = chunk * k_blocks * BLOCK_K
    end = tl.minimum(begin + k_blocks * BLOCK_K, K)
    for k in range(begin, end, BLOCK_K):
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
            kept = tl.where(keep, x.to(tl.float32) * survivor_scale, 0.0)
            x = cast(kept, x.dtype, INTERPRETED)
        acc = dot(x, cast(a, x.dtype, INTERPRETED), acc, PRECISION, INTERPRETED)

    start = chunk.to(tl.int64) * M * r  # which partial; the only one is s itself
    s_ptrs = s_ptr + start + rows.to(tl.int64)[:, None] * r + ranks[None, :]  # [BLOCK_M, BLOCK_R]
    inside = (rows < M)[:, None] & (ranks < r)[None, :]
    tl.store(s_ptrs, cast(acc, s_ptr.dtype.element_ty, INTERPRETED), mask=inside)


def shrink(
    x: Tensor,
    lora_A: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    config: LaunchConfig | None = None,
) -> Tensor:
    """``s = drop(x)·Aᵀ``.

    Shapes: ``x [M, K]``, ``lora_A [r, K]`` → ``s [M, r]``, in the dtype of ``x``.
    """
    M, K = x.shape
    r = lora_A.shape[0]
    s = torch.empty((M, r), device=x.device, dtype=x.dtype)
    if s.numel() == 0:
        return s
    c = config or config_for("shrink", r, x.element_size())
    row_blocks, rank_blocks = triton.cdiv(M, c.block_m), triton.cdiv(r, c.block_r)
    count, k_blocks = chunks(processors(x), K, c.block_k, row_blocks * rank_blocks)
    # Partial sums stay in float32 until the last addition.
    target = s if count == 1 else s.new_empty((count, M, r), dtype=torch.float32)
    with on_device(x):
        shrink_kernel[(row_blocks, count, rank_blocks)](
            x,
            lora_A,
            target,
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
            PRECISION=precision(x),
            INTERPRETED=INTERPRETED,
            **c.options,
            **dropout_arguments(x, dropout_p, seed),
        )
        return s if count == 1 else sum_partials(target, x.dtype)
