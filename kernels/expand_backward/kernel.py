"""``ds = scaling · dy·B`` and ``dB = scaling · dyᵀ·s``: one pass over dy for both.

dy is cut into row groups and column groups. Whoever takes a group of each walks down its rows: its dB
stays in registers, its share of ds leaves row block by row block. Both are float32 partial sums, added
up in a fixed order: dB by the last program of its column group; ds, of which one program alone would
have too much, by a second launch.
"""

import torch
import triton
import triton.language as tl
from lorafast.kernels.common.configs import LaunchConfig, chunks
from lorafast.kernels.common.counters import counters
from lorafast.kernels.common.device import arrive, cast, factor, low_rank_dot, sum_blocks
from lorafast.kernels.common.launch import (
    INTERPRETED,
    config_for,
    on_device,
    precision,
    processors,
)
from lorafast.kernels.common.sum_partials import sum_partials
from torch import Tensor


@triton.jit
def expand_backward_group(
    dy_ptr,
    s_ptr,
    b_ptr,
    ds_ptr,
    db_ptr,
    ds_partials_ptr,
    db_partials_ptr,
    counters_ptr,
    row_group,
    col_group,
    rank_block,
    row_groups,
    col_groups,
    rank_blocks,
    M,
    N,
    r,
    m_blocks,
    scaling,
    stride_dym,
    stride_dyn,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """ds and dB of ``m_blocks`` row blocks, BLOCK_N columns and BLOCK_R ranks.

    True for whoever has added up ds of these rows and ranks, which happens with SUM_ROWS. ``counters``
    has ``rank_blocks`` zeros for each row group, then for each column group.
    """
    cols = col_group * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    # 64 bits: M·N may pass 2**31 elements.
    col_offsets = cols.to(tl.int64)
    b = tl.load(
        b_ptr + col_offsets[:, None] * stride_bn + ranks.to(tl.int64)[None, :] * stride_br,
        mask=(cols < N)[:, None] & (ranks < r)[None, :],
        other=0.0,
    )  # [BLOCK_N, BLOCK_R]
    b = factor(b, dy_ptr.dtype.element_ty, INTERPRETED)

    ds_size = tl.cast(M, tl.int64) * r
    db_size = tl.cast(N, tl.int64) * r
    ds_part = ds_partials_ptr + col_group * ds_size
    db = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)  # transposed, so that dy is not
    # Counted in blocks, so that the compiler knows the alignment of every load.
    begin = row_group * m_blocks * BLOCK_M
    end = tl.minimum(begin + m_blocks * BLOCK_M, M)
    for m in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
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
        ds = low_rank_dot(dy, b, ds, PRECISION, INTERPRETED)
        tl.store(ds_part + row_offsets[:, None] * r + ranks[None, :], ds, mask=row_inside)
        db = low_rank_dot(tl.trans(s), dy, db, PRECISION, INTERPRETED)

    db_offsets = col_offsets[None, :] * r + ranks[:, None]  # [BLOCK_R, BLOCK_N]
    db_inside = (cols < N)[None, :] & (ranks < r)[:, None]
    tl.store(db_partials_ptr + row_group * db_size + db_offsets, db, mask=db_inside)

    of_rows = counters_ptr + row_group * rank_blocks + rank_block
    of_cols = counters_ptr + (row_groups + col_group) * rank_blocks + rank_block
    completed = False
    if SUM_ROWS:
        completed = arrive(of_rows) == col_groups - 1
        if completed:
            for m in range(begin, end, BLOCK_M):
                rows = m + tl.arange(0, BLOCK_M)
                inside = (rows < end)[:, None] & (ranks < r)[None, :]  # [BLOCK_M, BLOCK_R]
                offsets = rows.to(tl.int64)[:, None] * r + ranks[None, :]
                ds = sum_blocks(ds_partials_ptr, offsets, inside, ds_size, col_groups) * scaling
                ds = cast(ds, ds_ptr.dtype.element_ty, INTERPRETED)
                tl.store(ds_ptr + offsets, ds, mask=inside)
            tl.store(of_rows, 0)
    if arrive(of_cols) == row_groups - 1:
        db = sum_blocks(db_partials_ptr, db_offsets, db_inside, db_size, row_groups) * scaling
        tl.store(
            db_ptr + db_offsets, cast(db, db_ptr.dtype.element_ty, INTERPRETED), mask=db_inside
        )
        tl.store(of_cols, 0)
    return completed


@triton.jit(do_not_specialize=["M", "r", "m_blocks"])
def expand_backward_kernel(
    dy_ptr,
    s_ptr,
    b_ptr,
    db_ptr,
    ds_partials_ptr,
    db_partials_ptr,
    counters_ptr,
    M,
    N,
    r,
    m_blocks,
    scaling,
    stride_dym,
    stride_dyn,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program (i, j, l): column group i of dy, row group j, rank block l. ds leaves in partial sums."""
    expand_backward_group(
        dy_ptr, s_ptr, b_ptr, ds_partials_ptr, db_ptr, ds_partials_ptr, db_partials_ptr, counters_ptr,
        tl.program_id(1), tl.program_id(0), tl.program_id(2),
        tl.num_programs(1), tl.num_programs(0), tl.num_programs(2),
        M, N, r, m_blocks, scaling,
        stride_dym, stride_dyn, stride_sm, stride_sr, stride_bn, stride_br,
        BLOCK_M, BLOCK_N, BLOCK_R, STAGES, False, PRECISION, INTERPRETED,
    )  # fmt: skip


def expand_backward(
    dy: Tensor,
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """``ds = scaling · dy·B`` and ``dB = scaling · dyᵀ·s``.

    Shapes: ``dy [M, N]``, ``s [M, r]``, ``lora_B [N, r]`` → ``ds [M, r]`` in the dtype of ``s``,
    ``dB [N, r]`` in the dtype of ``lora_B``.
    """
    M, N = dy.shape
    r = lora_B.shape[1]
    if dy.numel() == 0:
        return s.new_zeros((M, r)), torch.zeros((N, r), device=dy.device, dtype=lora_B.dtype)
    c = config or config_for("expand_backward", dy, M, N, N, r, adapter_dtype=lora_B.dtype)
    col_groups, rank_blocks = triton.cdiv(N, c.block_n), triton.cdiv(r, c.block_r)
    row_groups, m_blocks = chunks(
        processors(dy) * c.ctas_per_sm, M, c.block_m, col_groups * rank_blocks
    )
    ds = torch.empty((M, r), device=dy.device, dtype=s.dtype)
    dB = torch.empty((N, r), device=dy.device, dtype=lora_B.dtype)
    partials = torch.empty((col_groups, M, r), device=dy.device, dtype=torch.float32)
    with on_device(dy):
        expand_backward_kernel[(col_groups, row_groups, rank_blocks)](
            dy,
            s,
            lora_B,
            dB,
            partials,
            dy.new_empty((row_groups, N, r), dtype=torch.float32),
            counters(dy, (row_groups + col_groups) * rank_blocks),
            M=M,
            N=N,
            r=r,
            m_blocks=m_blocks,
            scaling=float(scaling),
            stride_dym=dy.stride(0),
            stride_dyn=dy.stride(1),
            stride_sm=s.stride(0),
            stride_sr=s.stride(1),
            stride_bn=lora_B.stride(0),
            stride_br=lora_B.stride(1),
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            BLOCK_R=c.block_r,
            STAGES=c.num_stages,
            PRECISION=precision(dy),
            INTERPRETED=INTERPRETED,
            **c.options,
        )
        sum_partials(partials, ds, scaling)
    return ds, dB
