"""``y = drop(scaling · s·Bᵀ)``: y is written once, in rows of 16 bytes a thread, and not read.

A program keeps the columns that it has of B and goes through row blocks of s.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from lorafast.kernels.common.bundles import Matrix, Vector
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.device import cast, dot, drop_columns
from lorafast.kernels.common.launch import (
    INTERPRETED,
    KEPT,
    NO_MASK,
    mask_of,
    on_its_device,
    precision,
    rule_for,
    sms,
)
from lorafast.kernels.common.plan import ExpandLaunch, expand_launch
from lorafast.kernels.common.start import Start, key_of
from torch import Tensor


@triton.jit
def _tile_of_s(s, rows, first, M, r, BLOCK_R: tl.constexpr, EVEN_R: tl.constexpr):
    """``s [M, r]``, a ``Matrix``, for ``rows`` and BLOCK_R ranks from ``first`` on."""
    ranks = first + tl.arange(0, BLOCK_R)
    # 64 bits: strides may pass 2**31 elements.
    ptrs = s.ptr + rows.to(tl.int64)[:, None] * s.stride_row
    ptrs += ranks.to(tl.int64)[None, :] * s.stride_col  # [BLOCK_M, BLOCK_R]
    inside = (rows < M)[:, None]
    if not EVEN_R:  # else ranks are loaded 16 bytes at a time
        inside = inside & (ranks < r)[None, :]
    return tl.load(ptrs, mask=inside, other=0.0)


@triton.jit
def _tile_of_b(
    b,
    cols,
    first,
    N,
    r,
    dtype: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_R: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The transpose of ``b [N, r]``, a ``Matrix``, for ``cols`` and BLOCK_R ranks, in ``dtype``."""
    ranks = first + tl.arange(0, BLOCK_R)
    ptrs = b.ptr + cols.to(tl.int64)[None, :] * b.stride_row
    ptrs += ranks.to(tl.int64)[:, None] * b.stride_col  # [BLOCK_R, BLOCK_N]
    inside = (cols < N)[None, :]
    if not EVEN_R:
        inside = inside & (ranks < r)[:, None]
    return cast(tl.load(ptrs, mask=inside, other=0.0), dtype, INTERPRETED)


@triton.jit(do_not_specialize=["M", "m_blocks", "threshold"])
def expand_kernel(
    s_ptr,
    b_ptr,
    bias_ptr,
    y_ptr,
    seed_ptr,
    M,
    N,
    r,
    m_blocks,
    scale,
    threshold,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    stride_bias,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_R: tl.constexpr,
    ONE_RANK_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program (i, j): column block i, the ``m_blocks`` row blocks of group j.

    ``scale`` is that of survivors, too.
    """
    s = Matrix(s_ptr, stride_sm, stride_sr)
    b = Matrix(b_ptr, stride_bn, stride_br)
    dtype: tl.constexpr = s_ptr.dtype.element_ty
    first_col = tl.program_id(0) * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * m_blocks * BLOCK_M
    end = tl.minimum(begin + m_blocks * BLOCK_M, M)
    if ONE_RANK_BLOCK:
        b_tile = _tile_of_b(b, cols, 0, N, r, dtype, BLOCK_R, EVEN_R, INTERPRETED)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    if bias_ptr is not None:
        bias = Vector(bias_ptr, stride_bias)
        bias_ptrs = bias.ptr + cols.to(tl.int64) * bias.stride
        added = tl.load(bias_ptrs, mask=cols < N, other=0.0).to(tl.float32)  # [BLOCK_N]
    for m in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        rows = m + tl.arange(0, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if ONE_RANK_BLOCK:
            s_tile = _tile_of_s(s, rows, 0, M, r, BLOCK_R, EVEN_R)
            acc = dot(s_tile, b_tile, acc, PRECISION, INTERPRETED)
        else:
            for first in tl.range(0, r, BLOCK_R, num_stages=STAGES):
                s_tile = _tile_of_s(s, rows, first, M, r, BLOCK_R, EVEN_R)
                b_tile = _tile_of_b(b, cols, first, N, r, dtype, BLOCK_R, EVEN_R, INTERPRETED)
                acc = dot(s_tile, b_tile, acc, PRECISION, INTERPRETED)
        acc *= scale
        if bias_ptr is not None:
            if seed_ptr is not None:
                acc = drop_columns(acc, seed, rows, first_col, N, threshold)
            acc += added[None, :]
        rounded = cast(acc, y_ptr.dtype.element_ty, INTERPRETED)
        if seed_ptr is not None and bias_ptr is None:
            # Rounded first: half as many bytes change hands between threads.
            rounded = drop_columns(rounded, seed, rows, first_col, N, threshold)
        # 64 bits: M·N may pass 2**31 elements.
        y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :]
        tl.store(y_ptrs, rounded, mask=(rows < M)[:, None] & (cols < N)[None, :])


def expand(
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """``y = drop(scaling · s·Bᵀ)``, plus ``bias`` if there is one.

    Shapes: ``s [M, r]``, ``lora_B [N, r]``, ``bias [N]`` → ``y [M, N]`` in ``dtype``; ``s`` in the same,
    or in float32 for float16.
    """
    (M, r), N = s.shape, lora_B.shape[0]
    launch = expand_launch(
        config or rule_for("expand", s, M, N, N, r), M, N, r,
        sms=sms(s), dtype=dtype, precision=precision(s), bias=bias is not None,
        dropout=dropout_p > 0.0,
    )  # fmt: skip
    return launcher(launch, dtype)(s, lora_B, scaling, dropout_p, seed, bias)


@functools.lru_cache(maxsize=KEPT)
def launcher(launch: ExpandLaunch, dtype: torch.dtype) -> Callable[..., Tensor]:
    """What launches it: of ``s, lora_B, scaling, dropout_p, seed, bias``, the last three optional; y has
    ``dtype``."""
    c, M, N, r = launch.config, launch.M, launch.N, launch.r
    start = Start(expand_kernel, launch.grid, c.options)
    blocks = (
        c.block_m, c.block_n, c.block_r, launch.even, launch.rank_blocks == 1, c.num_stages,
        launch.precision, INTERPRETED,
    )  # fmt: skip

    @on_its_device
    def run(
        s: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        y = torch.empty((M, N), dtype=dtype, device=s.device)
        if not M * N:
            return y
        seed, threshold, survivor_scale = mask_of(dropout_p, seed) if launch.dropout else NO_MASK
        strides = (*s.stride(), *lora_B.stride(), None if bias is None else bias.stride(0))
        start(
            key_of(strides, tensors=(s, lora_B, bias, seed)),
            s, lora_B, bias, y, seed, M, N, r, launch.m_blocks, scaling * survivor_scale, threshold,
            *strides, *blocks,
        )  # fmt: skip
        return y

    return run
