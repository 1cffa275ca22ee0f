"""``ds = scaling · dy·B`` and ``dB = scaling · dyᵀ·s``: one pass over dy for both.

A program walks down a chunk of rows of one column block. Its dB stays in registers; its share of ds
leaves row block by row block. Both are partial sums, added in a fixed order afterwards.
"""

import torch
import triton
import triton.language as tl
from lorafast.kernels.common.configs import LaunchConfig, chunks, config_for
from lorafast.kernels.common.device import cast, dot
from lorafast.kernels.common.launch import INTERPRETED, on_device, precision, processors
from lorafast.kernels.common.sum_partials import sum_partials
from torch import Tensor


@triton.jit(do_not_specialize=["M", "r", "m_blocks"])
def expand_backward_kernel(
    dy_ptr,
    s_ptr,
    b_ptr,
    ds_ptr,
    db_ptr,
    M,
    N,
    r,
    m_blocks,
    stride_dym,
    stride_dyn,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program (i, j, l): column block i of dy, row chunk j, rank block l."""
    col_block = tl.program_id(0)
    chunk = tl.program_id(1)
    cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    # 64 bits: M·N may pass 2**31 elements.
    col_offsets = cols.to(tl.int64)
    b = tl.load(
        b_ptr + col_offsets[:, None] * stride_bn + ranks.to(tl.int64)[None, :] * stride_br,
        mask=(cols < N)[:, None] & (ranks < r)[None, :],
        other=0.0,
    )  # [BLOCK_N, BLOCK_R]
    b = cast(b, dy_ptr.dtype.element_ty, INTERPRETED)

    ds_part = ds_ptr + col_block.to(tl.int64) * M * r
    db = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    begin = chunk * m_blocks * BLOCK_M
    end = tl.minimum(begin + m_blocks * BLOCK_M, M)
    for m in range(begin, end, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        row_offsets = rows.to(tl.int64)
        row_inside = (rows < end)[:, None] & (ranks < r)[None, :]  # [BLOCK_M, BLOCK_R]
        dy = tl.load(
            dy_ptr + row_offsets[:, None] * stride_dym + col_offsets[None, :] * stride_dyn,
            mask=(rows < end)[:, None] & (cols < N)[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_N]
        s = tl.load(
            s_ptr + row_offsets[:, None] * stride_sm + ranks.to(tl.int64)[None, :] * stride_sr,
            mask=row_inside,
            other=0.0,
        )  # [BLOCK_M, BLOCK_R]
        ds = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        ds = dot(dy, b, ds, PRECISION, INTERPRETED)
        tl.store(ds_part + row_offsets[:, None] * r + ranks[None, :], ds, mask=row_inside)
        db = dot(tl.trans(dy), s, db, PRECISION, INTERPRETED)

    db_ptrs = db_ptr + chunk.to(tl.int64) * N * r + col_offsets[:, None] * r + ranks[None, :]
    tl.store(db_ptrs, db, mask=(cols < N)[:, None] & (ranks < r)[None, :])


def expand_backward(
    dy: Tensor,
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """``ds = scaling · dy·B`` and ``dB = scaling · dyᵀ·s``.

    Shapes: ``dy [M, N]``, ``s [M, r]``, ``lora_B [N, r]`` → ``ds [M, r]`` in the dtype of ``dy``,
    ``dB [N, r]`` in the dtype of ``lora_B``.
    """
    M, N = dy.shape
    r = lora_B.shape[1]
    if dy.numel() == 0:
        return s.new_zeros((M, r)), torch.zeros((N, r), device=dy.device, dtype=lora_B.dtype)
    c = config or config_for("expand_backward", r, dy.element_size())
    col_blocks, rank_blocks = triton.cdiv(N, c.block_n), triton.cdiv(r, c.block_r)
    count, m_blocks = chunks(processors(dy), M, c.block_m, col_blocks * rank_blocks)
    ds = torch.empty((col_blocks, M, r), device=dy.device, dtype=torch.float32)
    dB = torch.empty((count, N, r), device=dy.device, dtype=torch.float32)
    with on_device(dy):
        expand_backward_kernel[(col_blocks, count, rank_blocks)](
            dy,
            s,
            lora_B,
            ds,
            dB,
            M=M,
            N=N,
            r=r,
            m_blocks=m_blocks,
            stride_dym=dy.stride(0),
            stride_dyn=dy.stride(1),
            stride_sm=s.stride(0),
            stride_sr=s.stride(1),
            stride_bn=lora_B.stride(0),
            stride_br=lora_B.stride(1),
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            BLOCK_R=c.block_r,
            PRECISION=precision(dy),
            INTERPRETED=INTERPRETED,
            **c.options,
        )
        return sum_partials(ds, dy.dtype, scaling), sum_partials(dB, lora_B.dtype, scaling)
