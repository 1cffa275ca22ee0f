"""``dU``, ``du``, ``dh`` and ``dD`` of a bottleneck adapter from one launch, once z and da are there.

A program takes a block of columns, of dy or of h, and walks down a share of their rows: of dy it sums
``zᵀ·dy`` and dy itself and writes its columns of dh, of h it sums ``daᵀ·h``. So each matrix is read
once, by programs that fill the SMs together. Where rows are shared out each leaves partial sums in
float32, which the last one of a column block adds up in a fixed order.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from lorafast.kernels.bottleneck.kernel import strides_of
from lorafast.kernels.common.bottleneck_plan import ColumnsLaunch
from lorafast.kernels.common.bundles import Matrix
from lorafast.kernels.common.counters import counters
from lorafast.kernels.common.device import arrive, cast, factor, low_rank_dot, sum_blocks
from lorafast.kernels.common.launch import INTERPRETED, KEPT, on_its_device
from lorafast.kernels.common.start import Start, key_of
from torch import Tensor


@triton.jit
def _finish(out_ptr, partials_ptr, offsets, inside, size, places, scale, INTERPRETED: tl.constexpr):
    """``out = scale · Σ partials`` over all row groups, whose ``offsets`` are ``places`` in out."""
    total = sum_blocks(partials_ptr, offsets, inside, size, tl.num_programs(1))
    tl.store(
        out_ptr + places, cast(total * scale, out_ptr.dtype.element_ty, INTERPRETED), mask=inside
    )


@triton.jit
def _walk(
    x,
    low,
    da,
    down,
    dh_ptr,
    out,
    sums_ptr,
    partials_ptr,
    sums_partials_ptr,
    counter_ptr,
    block,
    begin,
    end,
    length,
    b,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    UP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Over the rows from begin to end, and for column block ``block`` of the matrix x ``[M, length]``:

    - ``out = scale · lowᵀ·x``, with ``low [M, b]``, and ``sums = scale · Σ x``;
    - ``dh = x + da·down``, with ``da [M, b]`` and ``down [b, length]``.

    ``x``, ``low``, ``da``, ``down`` and ``out``, whose rows are ranks, are ``Matrix``. Without ``low``
    there is no out, without ``sums`` none are made, without ``dh`` it isn't written.
    """
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    # 64 bits: M·length may pass 2**31 elements.
    col_offsets, rank_offsets = cols.to(tl.int64), ranks.to(tl.int64)
    inside = (ranks < b)[:, None] & (cols < length)[None, :]  # [BLOCK_R, BLOCK_N]
    if dh_ptr is not None:
        down_tile = tl.load(
            down.ptr
            + rank_offsets[:, None] * down.stride_row
            + col_offsets[None, :] * down.stride_col,
            mask=inside,
            other=0.0,
        )  # [BLOCK_R, BLOCK_N]
        down_tile = factor(down_tile, x.ptr.dtype.element_ty, INTERPRETED)
    acc = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for m in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        rows = m + tl.arange(0, BLOCK_M)
        offsets = rows.to(tl.int64)
        x_inside = (rows < end)[:, None] & (cols < length)[None, :]  # [BLOCK_M, BLOCK_N]
        x_tile = tl.load(
            x.ptr + offsets[:, None] * x.stride_row + col_offsets[None, :] * x.stride_col,
            mask=x_inside,
            other=0.0,
        )  # [BLOCK_M, BLOCK_N]
        if low is not None:
            low_tile = tl.load(
                low.ptr
                + rank_offsets[:, None] * low.stride_col
                + offsets[None, :] * low.stride_row,
                mask=(ranks < b)[:, None] & (rows < end)[None, :],
                other=0.0,
            )  # [BLOCK_R, BLOCK_M]
            # That many ranks are multiplied by wgmma: in flight, ptxas would serialize every one.
            acc = low_rank_dot(low_tile, x_tile, acc, PRECISION, INTERPRETED, APART=BLOCK_R >= 64)
        if sums_ptr is not None:
            sums += tl.sum(x_tile.to(tl.float32), axis=0)
        if dh_ptr is not None:
            da_tile = tl.load(
                da.ptr + offsets[:, None] * da.stride_row + rank_offsets[None, :] * da.stride_col,
                mask=(rows < end)[:, None] & (ranks < b)[None, :],
                other=0.0,
            )  # [BLOCK_M, BLOCK_R]
            dh = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            dh = low_rank_dot(da_tile, down_tile, dh, UP, INTERPRETED, APART=True)
            dh += x_tile.to(tl.float32)
            tl.store(
                dh_ptr + offsets[:, None] * length + col_offsets[None, :],
                cast(dh, dh_ptr.dtype.element_ty, INTERPRETED),
                mask=x_inside,
            )

    group = tl.cast(tl.program_id(1), tl.int64)
    places = rank_offsets[:, None] * length + col_offsets[None, :]  # [BLOCK_R, BLOCK_N]
    size = tl.cast(length, tl.int64) * b
    if low is not None:
        of_out = rank_offsets[:, None] * out.stride_row + col_offsets[None, :] * out.stride_col
    of_sums = cols < tl.where(tl.program_id(2) == 0, length, 0)  # the first rank block's alone
    if counter_ptr is not None:
        if low is not None:
            tl.store(partials_ptr + group * size + places, acc, mask=inside)
        if sums_ptr is not None:
            tl.store(sums_partials_ptr + group * length + cols, sums, mask=of_sums)
        counter = counter_ptr + tl.program_id(0) * tl.num_programs(2) + tl.program_id(2)
        if arrive(counter) == tl.num_programs(1) - 1:
            if low is not None:
                _finish(out.ptr, partials_ptr, places, inside, size, of_out, scale, INTERPRETED)
            if sums_ptr is not None:
                _finish(
                    sums_ptr, sums_partials_ptr, cols, of_sums, length, cols, scale, INTERPRETED
                )
            tl.store(counter, 0)
    else:
        if low is not None:
            acc = cast(acc * scale, out.ptr.dtype.element_ty, INTERPRETED)
            tl.store(out.ptr + of_out, acc, mask=inside)
        if sums_ptr is not None:
            sums = cast(sums * scale, sums_ptr.dtype.element_ty, INTERPRETED)
            tl.store(sums_ptr + cols, sums, mask=of_sums)


@triton.jit(do_not_specialize=["M", "m_blocks"])
def bottleneck_columns_kernel(
    dy_ptr,
    z_ptr,
    h_ptr,
    da_ptr,
    down_ptr,
    dh_ptr,
    du_ptr,
    dup_ptr,
    ddown_ptr,
    du_partials_ptr,
    dup_partials_ptr,
    ddown_partials_ptr,
    counters_ptr,
    M,
    K,
    N,
    b,
    m_blocks,
    scaling,
    stride_dym,
    stride_dyn,
    stride_hm,
    stride_hk,
    stride_db,
    stride_dk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    UP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program (i, j, l): column block i, first those of dy, then those of h; row group j, rank block l.

    ``dup`` is dU and ``ddown`` dD. What isn't asked for is None, and so is what it alone depends on.
    ``dh = dy + da·D`` is the work of dy's programs, and takes one rank block.
    """
    # Counted in blocks, so that the compiler knows the alignment of every load.
    begin = tl.program_id(1) * m_blocks * BLOCK_M
    end = tl.minimum(begin + m_blocks * BLOCK_M, M)
    da = Matrix(da_ptr, b, 1) if da_ptr is not None else None
    down = Matrix(down_ptr, stride_db, stride_dk) if down_ptr is not None else None
    block = tl.program_id(0)
    blocks_of_dy = 0
    if dy_ptr is not None:
        blocks_of_dy = tl.cdiv(N, BLOCK_N)
        if block < blocks_of_dy:
            z = Matrix(z_ptr, b, 1) if z_ptr is not None else None
            dup = Matrix(dup_ptr, 1, b) if dup_ptr is not None else None
            _walk(
                Matrix(dy_ptr, stride_dym, stride_dyn), z, da, down, dh_ptr,
                dup, du_ptr, dup_partials_ptr, du_partials_ptr, counters_ptr,
                block, begin, end, N, b, scaling,
                BLOCK_M, BLOCK_N, BLOCK_R, STAGES, PRECISION, UP, INTERPRETED,
            )  # fmt: skip
    if h_ptr is not None:
        h = Matrix(h_ptr, stride_hm, stride_hk)
        if block >= blocks_of_dy:
            _walk(
                h, da, None, None, None,
                Matrix(ddown_ptr, K, 1), None, ddown_partials_ptr, None, counters_ptr,
                block - blocks_of_dy, begin, end, K, b, 1.0,
                BLOCK_M, BLOCK_N, BLOCK_R, STAGES, PRECISION, UP, INTERPRETED,
            )  # fmt: skip


@functools.lru_cache(maxsize=KEPT)
def launcher(launch: ColumnsLaunch, dtype: torch.dtype) -> Callable[..., tuple[Tensor | None, ...]]:
    """What launches it: of ``dy, h, down, z, da, scaling``, gives ``dh, dD, dU, du``; all but dh have
    ``dtype``. What no result depends on that is asked for may be None."""
    c, M, K, N, b = launch.config, launch.M, launch.K, launch.N, launch.b
    col_blocks, row_groups, rank_blocks = launch.grid
    start = Start(bottleneck_columns_kernel, launch.grid, c.options)
    blocks = (
        c.block_m, c.block_k, c.block_r, c.num_stages,
        launch.precision, launch.up, INTERPRETED,
    )  # fmt: skip
    sizes = {"dD": (b, K), "dU": (N, b), "du": (N,)}
    asked = [name for name in sizes if name in launch.wants]
    want_dh, of_dy = "dh" in launch.wants, launch.of_dy

    @on_its_device
    def run(
        dy: Tensor,
        h: Tensor | None,
        down: Tensor | None,
        z: Tensor | None,
        da: Tensor | None,
        scaling: float,
    ) -> tuple[Tensor | None, ...]:
        device = dy.device
        dh = torch.empty((M, K), dtype=dy.dtype, device=device) if want_dh else None
        full = torch.empty if M else torch.zeros
        found = {name: full(sizes[name], dtype=dtype, device=device) for name in asked}
        if not M * col_blocks:
            return dh, found.get("dD"), found.get("dU"), found.get("du")
        # Those of dU are stored as dD's are, a row for each rank.
        split = asked if launch.split else ()
        partials = {
            name: torch.empty((row_groups, *sizes[name]), dtype=torch.float32, device=device)
            for name in split
        }
        used = counters(dy, col_blocks * rank_blocks) if launch.split else None
        # The same code whatever else is there.
        one, two = dy if of_dy else None, h if "dD" in found else None
        down, z = down if want_dh else None, z if "dU" in found else None
        da = da if want_dh or "dD" in found else None
        strides = (*strides_of(one, 2), *strides_of(two, 2), *strides_of(down, 2))
        start(
            key_of(strides, tensors=(dy, z, two, da, down)),
            one, z, two, da, down, dh, found.get("du"), found.get("dU"), found.get("dD"),
            partials.get("du"), partials.get("dU"), partials.get("dD"), used,
            M, K, N, b, launch.m_blocks, float(scaling), *strides, *blocks,
        )  # fmt: skip
        return dh, found.get("dD"), found.get("dU"), found.get("du")

    return run
