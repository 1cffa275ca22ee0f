"""``dA = dsᵀ·drop(x)``: one pass over x, its rows shared out over programs.

Each leaves a partial sum in float32; the last one of a column block adds them up in a fixed order.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from lorafast.kernels.common.bundles import Mask, Matrix
from lorafast.kernels.common.configs import LaunchConfig
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
    KEPT,
    NO_MASK,
    mask_of,
    on_its_device,
    rule_for,
    skinny_precision,
    sms,
)
from lorafast.kernels.common.plan import ShrinkBackwardLaunch, shrink_backward_launch
from lorafast.kernels.common.start import Start, key_of
from torch import Tensor


@triton.jit
def shrink_backward_columns(
    ds,
    x,
    mask,
    first_col,
    ranks,
    begin,
    end,
    K,
    r,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``dsᵀ·drop(x)`` in float32 for ``ranks`` and BLOCK_K columns, over the rows from begin to end.

    ``ds [M, r]`` and ``x [M, K]`` are ``Matrix``; ``mask`` is a ``Mask``, or None without dropout.
    """
    cols = first_col + tl.arange(0, BLOCK_K)
    # 64 bits: M·K may pass 2**31 elements.
    x_cols = x.ptr + cols.to(tl.int64)[None, :] * x.stride_col  # [1, BLOCK_K]
    ds_ranks = ds.ptr + ranks.to(tl.int64)[:, None] * ds.stride_col  # [BLOCK_R, 1]
    if mask is not None:
        seed = tl.load(mask.seed_ptr)
    acc = tl.zeros((ranks.shape[0], BLOCK_K), dtype=tl.float32)
    for m in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        rows = m + tl.arange(0, BLOCK_M)
        offsets = rows.to(tl.int64)
        x_tile = tl.load(
            x_cols + offsets[:, None] * x.stride_row,
            mask=(rows < end)[:, None] & (cols < K)[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
        ds_tile = tl.load(
            ds_ranks + offsets[None, :] * ds.stride_row,
            mask=(ranks < r)[:, None] & (rows < end)[None, :],
            other=0.0,
        )  # [BLOCK_R, BLOCK_M]
        if mask is not None:
            keep = keep_mask(seed, rows, first_col, K, mask.threshold, BLOCK_K)
            x_tile = drop(x_tile, keep, mask.scale, INTERPRETED)
        acc = low_rank_dot(ds_tile, x_tile, acc, PRECISION, INTERPRETED)
    return scale_sum(acc, x.ptr.dtype.element_ty, mask)


@triton.jit(do_not_specialize=["M", "m_blocks", "threshold"])
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
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program (i, j, l): column block i of x, row chunk j, rank block l."""
    ds = Matrix(ds_ptr, stride_dsm, stride_dsr)
    x = Matrix(x_ptr, stride_xm, stride_xk)
    mask = Mask(seed_ptr, threshold, survivor_scale) if seed_ptr is not None else None
    first_col = tl.program_id(0) * BLOCK_K
    chunk = tl.program_id(1)
    cols = first_col + tl.arange(0, BLOCK_K)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    # Counted in blocks, so that the compiler knows the alignment of every load.
    begin = chunk * m_blocks * BLOCK_M
    end = tl.minimum(begin + m_blocks * BLOCK_M, M)
    acc = shrink_backward_columns(
        ds, x, mask, first_col, ranks, begin, end, K, r,
        BLOCK_M, BLOCK_K, STAGES, PRECISION, INTERPRETED,
    )  # fmt: skip
    offsets = ranks.to(tl.int64)[:, None] * K + cols[None, :]  # [BLOCK_R, BLOCK_K]
    inside = (ranks < r)[:, None] & (cols < K)[None, :]
    if partials_ptr is not None:
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
    (M, K), r = x.shape, ds.shape[1]
    launch = shrink_backward_launch(
        config or rule_for("shrink_backward", x, M, K, K, r), M, K, r,
        sms=sms(x), precision=skinny_precision(x), dropout=dropout_p > 0.0,
    )  # fmt: skip
    return launcher(launch, dtype or x.dtype)(ds, x, dropout_p, seed)


@functools.lru_cache(maxsize=KEPT)
def launcher(launch: ShrinkBackwardLaunch, dtype: torch.dtype) -> Callable[..., Tensor]:
    """What launches it: of ``ds, x, dropout_p, seed``, the last two optional; dA has ``dtype``."""
    c, M, K, r = launch.config, launch.M, launch.K, launch.r
    col_blocks, count, rank_blocks = launch.grid
    start = Start(shrink_backward_kernel, launch.grid, c.options)
    blocks = (c.block_m, c.block_k, c.block_r, c.num_stages, launch.precision, INTERPRETED)

    @on_its_device
    def run(ds: Tensor, x: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
        if not M * K:
            return torch.zeros((r, K), dtype=dtype, device=x.device)
        dA = torch.empty((r, K), dtype=dtype, device=x.device)
        partials = used = None
        if launch.split:
            partials = torch.empty((count, r, K), dtype=torch.float32, device=x.device)
            used = counters(x, col_blocks * rank_blocks)
        seed, threshold, survivor_scale = mask_of(dropout_p, seed) if launch.dropout else NO_MASK
        strides = (*ds.stride(), *x.stride())
        start(
            key_of(strides, tensors=(ds, x, seed)),
            ds, x, dA, partials, used, seed, M, K, r, launch.m_blocks, threshold, survivor_scale,
            *strides, *blocks,
        )  # fmt: skip
        return dA

    return run
