"""``ds = scaling · dy·B``, ``dB = scaling · dyᵀ·s``, ``dbias = Σ dy``: one pass over dy for any of them.

dy is cut into row groups and column groups. Whoever takes a group of each walks down its rows: its dB
and dbias stay in registers, its share of ds leaves row block by row block. All are float32 partial sums,
added up in a fixed order: dB and dbias by the last program of their column group; ds, of which one
program alone would have too much, by a second launch. ds alone is a ``shrink`` of dy.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.counters import counters
from lorafast.kernels.common.device import arrive, cast, factor, low_rank_dot, sum_blocks
from lorafast.kernels.common.launch import (
    INTERPRETED,
    KEPT,
    on_its_device,
    precision,
    rule_for,
    sms,
)
from lorafast.kernels.common.plan import ExpandBackwardLaunch, expand_backward_launch
from lorafast.kernels.common.start import Start, key_of
from lorafast.kernels.common.sum_partials import launcher as launcher_of_sum
from lorafast.kernels.shrink import shrink
from torch import Tensor

from lorafast.reference import wide


@triton.jit
def _add_up(out_ptr, partials_ptr, offsets, inside, size, count, scale, INTERPRETED: tl.constexpr):
    """``out = scale · Σ partials`` of ``count`` row groups, each ``size`` elements, at ``offsets``."""
    total = sum_blocks(partials_ptr, offsets, inside, size, count) * scale
    tl.store(out_ptr + offsets, cast(total, out_ptr.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit(do_not_specialize=["M", "m_blocks"])
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

    What isn't asked for has no partial sums, and the factor that it alone takes is None: s is read for
    dB, B for ds. There is a counter for each column group and rank block.
    """
    col_group = tl.program_id(0)
    row_group = tl.program_id(1)
    rank_block = tl.program_id(2)
    cols = col_group * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    # 64 bits: M·N may pass 2**31 elements.
    col_offsets = cols.to(tl.int64)
    db_size = tl.cast(N, tl.int64) * r
    if ds_partials_ptr is not None:
        b_tile = tl.load(
            b_ptr + col_offsets[:, None] * stride_bn + ranks.to(tl.int64)[None, :] * stride_br,
            mask=(cols < N)[:, None] & (ranks < r)[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_R]
        b_tile = factor(b_tile, dy_ptr.dtype.element_ty, INTERPRETED)
        ds_part = ds_partials_ptr + col_group * (tl.cast(M, tl.int64) * r)
    if db_partials_ptr is not None:
        db_sum = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)  # transposed, so that dy is not
    if dbias_partials_ptr is not None:
        dbias_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    # Counted in blocks, so that the compiler knows the alignment of every load.
    begin = row_group * m_blocks * BLOCK_M
    end = tl.minimum(begin + m_blocks * BLOCK_M, M)
    for m in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        rows = m + tl.arange(0, BLOCK_M)
        row_offsets = rows.to(tl.int64)
        row_inside = (rows < end)[:, None] & (ranks < r)[None, :]  # [BLOCK_M, BLOCK_R]
        dy_tile = tl.load(
            dy_ptr + row_offsets[:, None] * stride_dym + col_offsets[None, :] * stride_dyn,
            mask=(rows < end)[:, None] & (cols < N)[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_N]
        if db_partials_ptr is not None:
            s_tile = tl.load(
                s_ptr + row_offsets[:, None] * stride_sm + ranks.to(tl.int64)[None, :] * stride_sr,
                mask=row_inside,
                other=0.0,
            )  # [BLOCK_M, BLOCK_R]
        if ds_partials_ptr is not None:
            ds_tile = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            ds_tile = low_rank_dot(dy_tile, b_tile, ds_tile, PRECISION, INTERPRETED)
            tl.store(ds_part + row_offsets[:, None] * r + ranks[None, :], ds_tile, mask=row_inside)
        if db_partials_ptr is not None:
            db_sum = low_rank_dot(
                tl.trans(s_tile), dy_tile, db_sum, PRECISION, INTERPRETED,
                # That many ranks are multiplied by wgmma: in flight, ptxas would serialize every one.
                APART=BLOCK_R >= 64,
            )  # fmt: skip
        if dbias_partials_ptr is not None:
            dbias_sum += tl.sum(dy_tile.to(tl.float32), axis=0)

    db_offsets = col_offsets[None, :] * r + ranks[:, None]  # [BLOCK_R, BLOCK_N]
    db_inside = (cols < N)[None, :] & (ranks < r)[:, None]
    if db_partials_ptr is not None:
        tl.store(db_partials_ptr + row_group * db_size + db_offsets, db_sum, mask=db_inside)
    if dbias_partials_ptr is not None:
        dbias_part = dbias_partials_ptr + tl.cast(row_group, tl.int64) * N
        if rank_block == 0:
            tl.store(dbias_part + cols, dbias_sum, mask=cols < N)
    groups = tl.num_programs(1)
    counter = counters_ptr + col_group * tl.num_programs(2) + rank_block
    if arrive(counter) == groups - 1:
        if db_partials_ptr is not None:
            _add_up(
                db_ptr, db_partials_ptr, db_offsets, db_inside, db_size, groups, scaling, INTERPRETED,
            )  # fmt: skip
        if dbias_partials_ptr is not None:
            inside = cols < N
            if rank_block == 0:
                _add_up(dbias_ptr, dbias_partials_ptr, cols, inside, N, groups, 1.0, INTERPRETED)
        tl.store(counter, 0)


Sums = tuple[Tensor | None, Tensor | None, Tensor | None]
"""``ds``, ``dB`` and ``dbias``, None for what isn't asked for."""


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
) -> Sums:
    """``ds = scaling · dy·B``, ``dB = scaling · dyᵀ·s``, ``dbias = Σ dy`` over rows: what is asked for.

    Shapes: ``dy [M, N]``, ``s [M, r]``, ``lora_B [N, r]`` → ``ds [M, r]`` in the dtype of ``dy``
    (float32 for float16), ``dB [N, r]``, contiguous, in the dtype of ``lora_B`` (without one, of
    ``dy``), ``dbias [N]`` in that of ``dy``. Without dB ``s`` may be None, without ds ``lora_B``.
    """
    M, N = dy.shape
    assert s is not None or not dB, "dB needs s"
    assert lora_B is not None or not ds, "ds needs lora_B"
    if lora_B is not None and ds and not (dB or dbias):
        return shrink(dy, lora_B.t(), scale=scaling), None, None
    r = lora_B.shape[1] if lora_B is not None else s.shape[1] if s is not None else 1
    asked = {"ds": ds, "dB": dB, "dbias": dbias}
    launch = expand_backward_launch(
        config or rule_for("expand_backward", dy, M, N, N, r), M, N, r,
        sms=sms(dy), precision=precision(dy),
        wants=tuple(name for name, wanted in asked.items() if wanted),
    )  # fmt: skip
    dtype = dy.dtype if lora_B is None else lora_B.dtype
    return launcher(launch, dtype)(dy, s, lora_B, scaling)


@functools.lru_cache(maxsize=KEPT)
def launcher(
    launch: ExpandBackwardLaunch, dtype: torch.dtype, dbias_dtype: torch.dtype | None = None
) -> Callable[..., Sums]:
    """What launches it: of ``dy, s, lora_B, scaling``; dB has ``dtype``, dbias ``dbias_dtype``, by
    default that of dy."""
    c, M, N, r = launch.config, launch.M, launch.N, launch.r
    col_groups, row_groups, rank_blocks = launch.grid
    want_ds, want_dB, want_dbias = (name in launch.wants for name in ("ds", "dB", "dbias"))
    used = col_groups * rank_blocks
    sum_up = launcher_of_sum(col_groups, M * r)
    start = Start(expand_backward_kernel, launch.grid, c.options)
    blocks = (c.block_m, c.block_n, c.block_r, c.num_stages, launch.precision, INTERPRETED)

    @on_its_device
    def run(dy: Tensor, s: Tensor | None, lora_B: Tensor | None, scaling: float) -> Sums:
        device, full = dy.device, torch.empty if M * N else torch.zeros
        ds = full((M, r), dtype=wide(dy.dtype), device=device) if want_ds else None
        dB = full((N, r), dtype=dtype, device=device) if want_dB else None
        dbias = full((N,), dtype=dbias_dtype or dy.dtype, device=device) if want_dbias else None
        if not (launch.wants and M * N):
            return ds, dB, dbias
        scaling = float(scaling)
        ds_partials = dB_partials = dbias_partials = None
        of_s: tuple[int | None, ...] = (None, None)
        of_B: tuple[int | None, ...] = (None, None)
        if want_ds:
            ds_partials = torch.empty((col_groups, M, r), dtype=torch.float32, device=device)
            assert lora_B is not None
            of_B = lora_B.stride()
        else:
            lora_B = None
        if want_dB:
            dB_partials = torch.empty((row_groups, N, r), dtype=torch.float32, device=device)
            assert s is not None
            of_s = s.stride()
        else:
            s = None
        if want_dbias:
            dbias_partials = torch.empty((row_groups, N), dtype=torch.float32, device=device)
        strides = (*dy.stride(), *of_s, *of_B)
        start(
            key_of(strides, tensors=(dy, s, lora_B)),
            dy, s, lora_B, dB, dbias, ds_partials, dB_partials, dbias_partials, counters(dy, used),
            M, N, r, launch.m_blocks, scaling, *strides, *blocks,
        )  # fmt: skip
        if ds is not None and ds_partials is not None:
            sum_up(ds_partials, ds, scaling)
        return ds, dB, dbias

    return run
