"""``s = drop(x)·Aᵀ``: one pass over x, its columns shared out over programs where rows are few.

Where they are, each program leaves a partial sum, and the last one of a row block adds them up.
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
    factor,
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
from lorafast.kernels.common.plan import ShrinkLaunch, shrink_launch
from lorafast.kernels.common.start import Start, key_of
from torch import Tensor

from lorafast.reference import wide


@triton.jit
def shrink_rows(
    x,
    a,
    mask,
    rows,
    ranks,
    begin,
    end,
    M,
    K,
    r,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    APART: tl.constexpr = False,
):
    """``drop(x)·Aᵀ`` in float32 for ``rows`` and ``ranks``, over the columns from begin to end.

    ``x [M, K]`` and ``a [r, K]`` are ``Matrix``; ``mask`` is a ``Mask``, or None without dropout. APART:
    each block is summed apart, so that no wgmma is in flight from one to the next.
    """
    # 64 bits: M·K may pass 2**31 elements.
    x_rows = x.ptr + rows.to(tl.int64)[:, None] * x.stride_row  # [BLOCK_M, 1]
    a_rows = a.ptr + ranks.to(tl.int64)[None, :] * a.stride_row  # [1, BLOCK_R]
    if mask is not None:
        seed = tl.load(mask.seed_ptr)
    acc = tl.zeros((rows.shape[0], ranks.shape[0]), dtype=tl.float32)
    for k in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        cols = k + tl.arange(0, BLOCK_K)
        offsets = cols.to(tl.int64)
        x_tile = tl.load(
            x_rows + offsets[None, :] * x.stride_col,
            mask=(rows < M)[:, None] & (cols < end)[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
        a_tile = tl.load(
            a_rows + offsets[:, None] * a.stride_col,
            mask=(ranks < r)[None, :] & (cols < end)[:, None],
            other=0.0,
        )  # [BLOCK_K, BLOCK_R]
        if mask is not None:
            keep = keep_mask(seed, rows, k, K, mask.threshold, BLOCK_K)
            x_tile = drop(x_tile, keep, mask.scale, INTERPRETED)
        a_tile = factor(a_tile, x_tile.dtype, INTERPRETED)
        acc = low_rank_dot(x_tile, a_tile, acc, PRECISION, INTERPRETED, APART)
    return scale_sum(acc, x.ptr.dtype.element_ty, mask)


@triton.jit(do_not_specialize=["M", "k_blocks", "threshold"])
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
    scale,
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
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program (i, j, l) shrinks row block i over column chunk j for rank block l.

    ``scale`` may be None, ``partials`` and ``counters`` are where one program has not all of K.
    """
    x = Matrix(x_ptr, stride_xm, stride_xk)
    a = Matrix(a_ptr, stride_ar, stride_ak)
    mask = Mask(seed_ptr, threshold, survivor_scale) if seed_ptr is not None else None
    chunk = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    # Counted in blocks, so that the compiler knows the alignment of every load.
    begin = chunk * k_blocks * BLOCK_K
    end = tl.minimum(begin + k_blocks * BLOCK_K, K)
    acc = shrink_rows(
        x, a, mask, rows, ranks, begin, end, M, K, r,
        BLOCK_K, STAGES, PRECISION, INTERPRETED,
        # A masked tile is in registers: in flight, ptxas would serialize every wgmma.
        APART=seed_ptr is not None,
    )  # fmt: skip
    offsets = rows.to(tl.int64)[:, None] * r + ranks[None, :]  # [BLOCK_M, BLOCK_R]
    inside = (rows < M)[:, None] & (ranks < r)[None, :]
    if partials_ptr is not None:
        size = tl.cast(M, tl.int64) * r
        tl.store(partials_ptr + chunk * size + offsets, acc, mask=inside)
        counter = counters_ptr + tl.program_id(0) * tl.num_programs(2) + tl.program_id(2)
        if arrive(counter) == tl.num_programs(1) - 1:
            acc = sum_blocks(partials_ptr, offsets, inside, size, tl.num_programs(1))
            if scale is not None:
                acc *= scale
            tl.store(s_ptr + offsets, cast(acc, s_ptr.dtype.element_ty, INTERPRETED), mask=inside)
            tl.store(counter, 0)
    else:
        if scale is not None:
            acc *= scale
        tl.store(s_ptr + offsets, cast(acc, s_ptr.dtype.element_ty, INTERPRETED), mask=inside)


def shrink(
    x: Tensor,
    lora_A: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    scale: float | None = None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """``s = drop(x)·Aᵀ``, times ``scale`` if there is one.

    Shapes: ``x [M, K]``, ``lora_A [r, K]`` → ``s [M, r]``, in the dtype of ``x`` (float32 for
    float16).
    """
    (M, K), r = x.shape, lora_A.shape[0]
    launch = shrink_launch(
        config or rule_for("shrink", x, M, K, K, r), M, K, r,
        sms=sms(x), precision=skinny_precision(x), dropout=dropout_p > 0.0,
    )  # fmt: skip
    return launcher(launch)(x, lora_A, dropout_p, seed, scale)


@functools.lru_cache(maxsize=KEPT)
def launcher(launch: ShrinkLaunch) -> Callable[..., Tensor]:
    """What launches it: of ``x, lora_A, dropout_p, seed, scale``, the last three optional."""
    c, M, K, r = launch.config, launch.M, launch.K, launch.r
    row_blocks, count, rank_blocks = launch.grid
    start = Start(shrink_kernel, launch.grid, c.options)
    blocks = (c.block_m, c.block_k, c.block_r, c.num_stages, launch.precision, INTERPRETED)

    @on_its_device
    def run(
        x: Tensor,
        lora_A: Tensor,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        s = torch.empty((M, r), dtype=wide(x.dtype), device=x.device)
        if not M * r:
            return s
        partials = used = None
        if launch.split:
            partials = torch.empty((count, M, r), dtype=torch.float32, device=x.device)
            used = counters(x, row_blocks * rank_blocks)
        seed, threshold, survivor_scale = mask_of(dropout_p, seed) if launch.dropout else NO_MASK
        strides = (*x.stride(), *lora_A.stride())
        start(
            key_of(scale is None, strides, tensors=(x, lora_A, seed)),
            x, lora_A, s, partials, used, seed, M, K, r, launch.k_blocks,
            None if scale is None else float(scale), threshold, survivor_scale, *strides, *blocks,
        )  # fmt: skip
        return s

    return run
