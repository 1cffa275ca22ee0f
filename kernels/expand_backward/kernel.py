"""``ds = scaling · dy·B``, ``dB = scaling · dyᵀ·s``, ``dbias = Σ dy``: one pass over dy for any of them.

dy is cut into row groups and column groups. Whoever takes a group of each walks down its rows: its dB
and dbias stay in registers, its share of ds leaves row block by row block. All are float32 partial sums,
added up in a fixed order: dB and dbias by the last program of their column group; ds, of which one
program alone would have too much, by a second launch. ds alone is a ``shrink`` of dy.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from lorafast.kernels.common.bundles import Matrix, Sum
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
from lorafast.kernels.shrink import shrink
from torch import Tensor

from lorafast.reference import wide


@triton.jit
def expand_backward_group(
    dy,
    s,
    b,
    ds_ptr,
    ds_partials_ptr,
    db,
    dbias,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """What ``m_blocks`` row blocks, BLOCK_N columns and BLOCK_R ranks give to ds, dB and dbias.

    ``dy [M, N]``, ``s [M, r]`` and ``b [N, r]`` are ``Matrix``, ``db`` and ``dbias`` are ``Sum``. What
    isn't asked for is None, with the factor that it alone takes: s is read for dB, B for ds. Without
    ``ds_ptr`` another launch adds up the partial sums of ds. True for whoever has added up ds of these
    rows and ranks, who is the last of them. ``counters`` has ``rank_blocks`` zeros for each row group,
    then for each column group.
    """
    cols = col_group * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    # 64 bits: M·N may pass 2**31 elements.
    col_offsets = cols.to(tl.int64)
    ds_size = tl.cast(M, tl.int64) * r
    db_size = tl.cast(N, tl.int64) * r
    if ds_partials_ptr is not None:
        b_tile = tl.load(
            b.ptr
            + col_offsets[:, None] * b.stride_row
            + ranks.to(tl.int64)[None, :] * b.stride_col,
            mask=(cols < N)[:, None] & (ranks < r)[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_R]
        b_tile = factor(b_tile, dy.ptr.dtype.element_ty, INTERPRETED)
        ds_part = ds_partials_ptr + col_group * ds_size
    if db is not None:
        db_sum = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)  # transposed, so that dy is not
    if dbias is not None:
        dbias_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    # Counted in blocks, so that the compiler knows the alignment of every load.
    begin = row_group * m_blocks * BLOCK_M
    end = tl.minimum(begin + m_blocks * BLOCK_M, M)
    for m in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        rows = m + tl.arange(0, BLOCK_M)
        row_offsets = rows.to(tl.int64)
        row_inside = (rows < end)[:, None] & (ranks < r)[None, :]  # [BLOCK_M, BLOCK_R]
        dy_tile = tl.load(
            dy.ptr + row_offsets[:, None] * dy.stride_row + col_offsets[None, :] * dy.stride_col,
            mask=(rows < end)[:, None] & (cols < N)[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_N]
        if db is not None:
            s_tile = tl.load(
                s.ptr
                + row_offsets[:, None] * s.stride_row
                + ranks.to(tl.int64)[None, :] * s.stride_col,
                mask=row_inside,
                other=0.0,
            )  # [BLOCK_M, BLOCK_R]
        if ds_partials_ptr is not None:
            ds_tile = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            ds_tile = low_rank_dot(dy_tile, b_tile, ds_tile, PRECISION, INTERPRETED)
            tl.store(ds_part + row_offsets[:, None] * r + ranks[None, :], ds_tile, mask=row_inside)
        if db is not None:
            db_sum = low_rank_dot(tl.trans(s_tile), dy_tile, db_sum, PRECISION, INTERPRETED)
        if dbias is not None:
            dbias_sum += tl.sum(dy_tile.to(tl.float32), axis=0)

    db_offsets = col_offsets[None, :] * r + ranks[:, None]  # [BLOCK_R, BLOCK_N]
    db_inside = (cols < N)[None, :] & (ranks < r)[:, None]
    if db is not None:
        db_part = db.partials_ptr + row_group * db_size
        tl.store(db_part + db_offsets, db_sum, mask=db_inside)
    if dbias is not None:
        dbias_part = dbias.partials_ptr + tl.cast(row_group, tl.int64) * N
        if rank_block == 0:
            tl.store(dbias_part + cols, dbias_sum, mask=cols < N)

    of_rows = counters_ptr + row_group * rank_blocks + rank_block
    of_cols = counters_ptr + (row_groups + col_group) * rank_blocks + rank_block
    completed = False
    if ds_ptr is not None:
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
        if db is not None:
            total = sum_blocks(db.partials_ptr, db_offsets, db_inside, db_size, row_groups)
            total = cast(total * scaling, db.ptr.dtype.element_ty, INTERPRETED)
            tl.store(db.ptr + db_offsets, total, mask=db_inside)
        if dbias is not None:
            inside = cols < N
            if rank_block == 0:
                of_bias = sum_blocks(dbias.partials_ptr, cols, inside, N, row_groups)
                of_bias = cast(of_bias, dbias.ptr.dtype.element_ty, INTERPRETED)
                tl.store(dbias.ptr + cols, of_bias, mask=inside)
        tl.store(of_cols, 0)
    return completed


@triton.jit(do_not_specialize=["M", "r", "m_blocks"])
def expand_backward_kernel(
    dy_ptr,
    s_ptr,
    b_ptr,
    db_ptr,
    dbias_ptr,
    ds_partials_ptr,
    db_partials_ptr,
    dbias_partials_ptr,
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
    """Program (i, j, l): column group i of dy, row group j, rank block l. ds leaves in partial sums.

    What isn't asked for has no partial sums.
    """
    s = Matrix(s_ptr, stride_sm, stride_sr) if s_ptr is not None else None
    b = Matrix(b_ptr, stride_bn, stride_br) if b_ptr is not None else None
    db = Sum(db_ptr, db_partials_ptr) if db_partials_ptr is not None else None
    dbias = Sum(dbias_ptr, dbias_partials_ptr) if dbias_partials_ptr is not None else None
    expand_backward_group(
        Matrix(dy_ptr, stride_dym, stride_dyn), s, b, None, ds_partials_ptr, db, dbias, counters_ptr,
        tl.program_id(1), tl.program_id(0), tl.program_id(2),
        tl.num_programs(1), tl.num_programs(0), tl.num_programs(2),
        M, N, r, m_blocks, scaling,
        BLOCK_M, BLOCK_N, BLOCK_R, STAGES, PRECISION, INTERPRETED,
    )  # fmt: skip


_MOST_BESIDE_DBIAS = 16
"""Elements of dB a thread, beside which dbias is added up without spilling."""


def expand_backward(
    dy: Tensor,
    s: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    *,
    ds: bool = True,
    dB: bool = True,
    dbias: bool = False,
    config: LaunchConfig | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``ds = scaling · dy·B``, ``dB = scaling · dyᵀ·s``, ``dbias = Σ dy`` over rows: what is asked for.

    Shapes: ``dy [M, N]``, ``s [M, r]``, ``lora_B [N, r]`` → ``ds [M, r]`` in the dtype of ``dy``
    (float32 for float16), ``dB [N, r]``, contiguous, in the dtype of ``lora_B`` (without one, of
    ``dy``), ``dbias [N]`` in that of ``dy``. Without dB ``s`` may be None, without ds ``lora_B``.
    """
    M, N = dy.shape
    assert s is not None or not dB, "dB needs s"
    assert lora_B is not None or not ds, "ds needs lora_B"
    if ds and lora_B is not None and dy.numel() and not (dB or dbias):
        return shrink(dy, lora_B.t(), scale=scaling), None, None
    r = lora_B.shape[1] if lora_B is not None else s.shape[1] if s is not None else 1
    of_ds = _empty((M, r), wide(dy.dtype), dy) if ds else None
    of_B = _empty((N, r), dy.dtype if lora_B is None else lora_B.dtype, dy) if dB else None
    of_bias = _empty((N,), dy.dtype, dy) if dbias else None
    if dy.numel() == 0 or not (ds or dB or dbias):
        for sums in (of_ds, of_B, of_bias):
            if sums is not None:
                sums.zero_()
        return of_ds, of_B, of_bias
    adapter_dtype = None if lora_B is None else lora_B.dtype
    c = config or config_for("expand_backward", dy, M, N, N, r, adapter_dtype=adapter_dtype)
    c = _fitting(c, ds, dbias)
    col_groups, rank_blocks = triton.cdiv(N, c.block_n), triton.cdiv(r, c.block_r)
    row_groups, m_blocks = chunks(
        processors(dy) * c.ctas_per_sm, M, c.block_m, col_groups * rank_blocks
    )
    ds_partials = _empty((col_groups, M, r), torch.float32, dy) if ds else None
    with on_device(dy):
        expand_backward_kernel[(col_groups, row_groups, rank_blocks)](
            dy,
            s if dB else None,
            lora_B if ds else None,
            of_B,
            of_bias,
            ds_partials,
            _empty((row_groups, N, r), torch.float32, dy) if dB else None,
            _empty((row_groups, N), torch.float32, dy) if dbias else None,
            counters(dy, (row_groups + col_groups) * rank_blocks),
            M=M,
            N=N,
            r=r,
            m_blocks=m_blocks,
            scaling=float(scaling),
            stride_dym=dy.stride(0),
            stride_dyn=dy.stride(1),
            stride_sm=s.stride(0) if s is not None and dB else None,
            stride_sr=s.stride(1) if s is not None and dB else None,
            stride_bn=lora_B.stride(0) if lora_B is not None and ds else None,
            stride_br=lora_B.stride(1) if lora_B is not None and ds else None,
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            BLOCK_R=c.block_r,
            STAGES=c.num_stages,
            PRECISION=precision(dy),
            INTERPRETED=INTERPRETED,
            **c.options,
        )
        if ds_partials is not None and of_ds is not None:
            sum_partials(ds_partials, of_ds, scaling)
    return of_ds, of_B, of_bias


def _fitting(c: LaunchConfig, ds: bool, dbias: bool) -> LaunchConfig:
    """Smaller tiles where registers would spill: found by compiling.

    Half as many columns, which without ds costs nothing, for there are no partial sums of it to grow;
    half as many ranks where a thread would be left less than 16 bytes of dy.
    """
    threads = 32 * c.num_warps
    wide_enough = c.block_m * c.block_n // threads >= 16
    if ds and not (dbias and c.block_r * c.block_n // threads > _MOST_BESIDE_DBIAS):
        return c
    if wide_enough:
        return dataclasses.replace(c, block_n=max(c.block_n // 2, 16))
    return dataclasses.replace(c, block_r=max(c.block_r // 2, 16)) if ds else c


def _empty(size: tuple[int, ...], dtype: torch.dtype, x: Tensor) -> Tensor:
    return torch.empty(size, dtype=dtype, device=x.device)
