"""A tile of ``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias``: where it is, its main loop, its last steps.

x and W are read by TMA, through tensor descriptors, or through pointers, which take any strides.
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from lorafast.kernels.common.configs import GROUP_M
from lorafast.kernels.common.device import cast, dot, drop_pairs
from lorafast.kernels.common.plan import LinearExpandLaunch
from lorafast.kernels.common.tma import describer
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def tile_at(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row block and column block of a tile: tiles come in groups of GROUP_M row blocks, so that those
    which run together share tiles of W in the L2 cache."""
    row_blocks = tl.cdiv(M, BLOCK_M)
    group_size = GROUP_M * tl.cdiv(N, BLOCK_N)
    group_first = tile // group_size * GROUP_M
    group_rows = tl.minimum(row_blocks - group_first, GROUP_M)
    return group_first + tile % group_size % group_rows, tile % group_size // group_rows


@triton.jit
def multiply(
    acc,
    x,
    w,
    row_block,
    col_block,
    begin,
    end,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    N_MAJOR: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    scale=None,
):
    """``acc + x·Wᵀ`` in float32 for one tile over the K blocks from begin to end.

    ``x [M, K]`` and ``w [N, K]`` are descriptors, with N_MAJOR that of W as ``[K, N]``, or ``Matrix``.
    ``scale``: a ``Vector`` ``[K]`` that multiplies x as it is loaded, or None.
    """
    if DESCRIPTORS:
        m = row_block * BLOCK_M
        n = col_block * BLOCK_N
        for block in tl.range(begin, end):
            k = block * BLOCK_K
            x_tile = x.load([m, k])  # [BLOCK_M, BLOCK_K]
            if scale is not None:
                x_tile = _scaled(x_tile, scale, k, K, INTERPRETED)
            w_tile = w.load([k, n]) if N_MAJOR else tl.trans(w.load([n, k]))  # [BLOCK_K, BLOCK_N]
            acc = dot(x_tile, w_tile, acc, PRECISION, INTERPRETED)
    else:
        rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
        # 64 bits: M·K and N·K may pass 2**31 elements.
        x_rows = x.ptr + rows.to(tl.int64)[:, None] * x.stride_row  # [BLOCK_M, 1]
        w_cols = w.ptr + cols.to(tl.int64)[None, :] * w.stride_row  # [1, BLOCK_N]
        for block in tl.range(begin, end):
            depth = block * BLOCK_K + tl.arange(0, BLOCK_K)
            offsets = depth.to(tl.int64)
            x_tile = tl.load(
                x_rows + offsets[None, :] * x.stride_col,
                mask=(rows < M)[:, None] & (depth < K)[None, :],
                other=0.0,
            )  # [BLOCK_M, BLOCK_K]
            if scale is not None:
                x_tile = _scaled(x_tile, scale, block * BLOCK_K, K, INTERPRETED)
            w_tile = tl.load(
                w_cols + offsets[:, None] * w.stride_col,
                mask=(cols < N)[None, :] & (depth < K)[:, None],
                other=0.0,
            )  # [BLOCK_K, BLOCK_N]
            acc = dot(x_tile, w_tile, acc, PRECISION, INTERPRETED)
    return acc


@triton.jit
def _scaled(x_tile, scale, first, K, INTERPRETED: tl.constexpr):
    """``scale ⊙ x`` for a tile whose columns start at ``first``, rounded as x is."""
    columns = first + tl.arange(0, x_tile.shape[1])
    factors = tl.load(
        scale.ptr + columns.to(tl.int64) * scale.stride, mask=columns < K, other=0.0
    )  # [BLOCK_K]
    return cast(x_tile.to(tl.float32) * factors.to(tl.float32)[None, :], x_tile.dtype, INTERPRETED)


@triton.jit
def add_low_rank(
    acc,
    s,
    b,
    rows,
    cols,
    M,
    N,
    r,
    scale,
    BLOCK_R: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``acc + s·(scale · B)ᵀ`` for the tile at ``rows`` and ``cols``; ``s``, ``b`` are ``Matrix``."""
    # Pointers, not descriptors: a program of this launch may just have written s, and TMA doesn't see
    # that without a fence of its own.
    s_rows = s.ptr + rows.to(tl.int64)[:, None] * s.stride_row  # [BLOCK_M, 1]
    b_cols = b.ptr + cols.to(tl.int64)[None, :] * b.stride_row  # [1, BLOCK_N]
    if RANK_BLOCKS > 0:
        # A loop that follows the main loop would keep the tiles' loop from being flattened.
        for i in tl.static_range(RANK_BLOCKS):
            acc = _add_rank_block(
                acc, s_rows, b_cols, i * BLOCK_R, rows, cols, M, N, r, scale, s.stride_col, b.stride_col,
                BLOCK_R, PRECISION, INTERPRETED,
            )  # fmt: skip
    else:
        for first in range(0, r, BLOCK_R):
            acc = _add_rank_block(
                acc, s_rows, b_cols, first, rows, cols, M, N, r, scale, s.stride_col, b.stride_col,
                BLOCK_R, PRECISION, INTERPRETED,
            )  # fmt: skip
    return acc


@triton.jit
def _add_rank_block(
    acc,
    s_rows,
    b_cols,
    first,
    rows,
    cols,
    M,
    N,
    r,
    scale,
    stride_sr,
    stride_br,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    ranks = first + tl.arange(0, BLOCK_R)
    offsets = ranks.to(tl.int64)
    s = tl.load(
        s_rows + offsets[None, :] * stride_sr,
        mask=(rows < M)[:, None] & (ranks < r)[None, :],
        other=0.0,
    )  # [BLOCK_M, BLOCK_R]
    b = tl.load(
        b_cols + offsets[:, None] * stride_br,
        mask=(cols < N)[None, :] & (ranks < r)[:, None],
        other=0.0,
    )  # [BLOCK_R, BLOCK_N]
    b = cast(b.to(tl.float32) * scale, s.dtype, INTERPRETED)
    return dot(s, b, acc, PRECISION, INTERPRETED)


@triton.jit
def masked_low_rank(
    s,
    b,
    mask,
    row_block,
    col_block,
    M,
    N,
    r,
    scaling,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``drop(scaling · s·Bᵀ)`` of one tile, its mask made in PARTS of the columns."""
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = col_block * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = add_low_rank(
        acc, s, b, rows, cols, M, N, r, 1.0, BLOCK_R, RANK_BLOCKS, PRECISION, INTERPRETED
    )
    acc *= scaling * mask.scale
    return _drop(acc, tl.load(mask.seed_ptr), rows, first_col, N, mask.threshold, PARTS)


@triton.jit
def _drop(acc, seed, rows, first_col, N, threshold, PARTS: tl.constexpr):
    """``drop_pairs``, part by part: the words of a whole mask are too many registers."""
    if PARTS > 1:
        HALF: tl.constexpr = acc.shape[1] // 2
        halves = tl.permute(tl.reshape(acc, (acc.shape[0], 2, HALF)), (0, 2, 1))
        left, right = tl.split(halves)
        left = _drop(left, seed, rows, first_col, N, threshold, PARTS // 2)
        right = _drop(right, seed, rows, first_col + HALF, N, threshold, PARTS // 2)
        acc = tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), acc.shape)
    else:
        acc = drop_pairs(acc, seed, rows, first_col, N, threshold)
    return acc


@triton.jit
def finish(
    acc,
    y,
    bias,
    row_block,
    first_col,
    M,
    N,
    PARTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    scale=None,
    z=None,
    kept=None,
    sums_ptr=None,
):
    """Writes a tile in PARTS of its columns, with the bias, rounded.

    ``y [M, N]`` is a descriptor or a pointer; ``bias`` is a ``Vector`` or None. ``scale``: a ``Vector``
    ``[N]`` that multiplies what is written to y; ``z``, as y: where it is written before that, too;
    ``sums_ptr``: to row ``row_block`` of which the sums over rows of the same, times the ``Matrix``
    ``kept``, are written. Each may be None, and with ``sums_ptr`` y.
    """
    if PARTS > 1:
        HALF: tl.constexpr = acc.shape[1] // 2
        halves = tl.permute(tl.reshape(acc, (acc.shape[0], 2, HALF)), (0, 2, 1))
        left, right = tl.split(halves)
        finish(
            left, y, bias, row_block, first_col, M, N, PARTS // 2, DESCRIPTORS, INTERPRETED,
            scale, z, kept, sums_ptr,
        )  # fmt: skip
        finish(
            right, y, bias, row_block, first_col + HALF, M, N, PARTS // 2, DESCRIPTORS, INTERPRETED,
            scale, z, kept, sums_ptr,
        )  # fmt: skip
    else:
        rows = row_block * acc.shape[0] + tl.arange(0, acc.shape[0])
        cols = first_col + tl.arange(0, acc.shape[1])
        if bias is not None:
            bias_ptrs = bias.ptr + cols.to(tl.int64) * bias.stride
            added = tl.load(bias_ptrs, mask=cols < N, other=0.0)  # [columns]
            acc += added.to(tl.float32)[None, :]
        if z is not None:
            _store(acc, z, row_block, first_col, rows, cols, M, N, DESCRIPTORS, INTERPRETED)
        if sums_ptr is not None:
            tile = tl.load(
                kept.ptr
                + rows.to(tl.int64)[:, None] * kept.stride_row
                + cols.to(tl.int64)[None, :] * kept.stride_col,
                mask=(rows < M)[:, None] & (cols < N)[None, :],
                other=0.0,
            )  # [BLOCK_M, columns]
            # Beyond M an infinite W has made NaN of zeros.
            products = tl.where((rows < M)[:, None], acc * tile.to(tl.float32), 0.0)
            tl.store(
                sums_ptr + row_block.to(tl.int64) * N + cols, tl.sum(products, 0), mask=cols < N
            )
        if scale is not None:
            factors = tl.load(
                scale.ptr + cols.to(tl.int64) * scale.stride, mask=cols < N, other=0.0
            )  # [columns]
            acc *= factors.to(tl.float32)[None, :]
        if y is not None:
            _store(acc, y, row_block, first_col, rows, cols, M, N, DESCRIPTORS, INTERPRETED)


@triton.jit
def _store(
    acc,
    y,
    row_block,
    first_col,
    rows,
    cols,
    M,
    N,
    DESCRIPTORS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Writes a tile, rounded."""
    rounded = cast(acc, y.dtype if DESCRIPTORS else y.dtype.element_ty, INTERPRETED)
    if DESCRIPTORS:
        y.store([row_block * acc.shape[0], first_col], rounded)
    else:
        y_ptrs = y + rows.to(tl.int64)[:, None] * N + cols[None, :]
        tl.store(y_ptrs, rounded, mask=(rows < M)[:, None] & (cols < N)[None, :])


Operands = tuple[
    Tensor | TensorDescriptor, Tensor | TensorDescriptor, Tensor | TensorDescriptor | None
]
"""``x``, ``w`` and ``y`` as tiles are read and written; no y where none is written."""


def blocks_of(launch: LinearExpandLaunch) -> tuple[Any, ...]:
    """The compile-time constants of a kernel that works through tiles, from BLOCK_M to FLATTEN."""
    c = launch.config
    return (
        c.block_m, c.block_n, c.block_k, c.block_r, launch.rank_blocks, GROUP_M, launch.parts,
        launch.tma, launch.n_major, launch.flatten,
    )  # fmt: skip


def operands_of(
    launch: LinearExpandLaunch,
) -> Callable[[Tensor, Tensor, Tensor | None], Operands]:
    """What makes the operands of a launch of ``x``, the weight and ``y``: descriptors or the tensors."""
    if not launch.tma:
        return lambda x, weight, y: (x, weight, y)
    c = launch.config
    of_x = describer([c.block_m, c.block_k])
    of_w = describer([c.block_k, c.block_n] if launch.n_major else [c.block_n, c.block_k])
    of_y = describer([c.block_m, c.block_n // launch.parts])
    as_stored = launch.n_major is launch.transposed

    def describe(x: Tensor, weight: Tensor, y: Tensor | None) -> Operands:
        w = of_w(weight if as_stored else weight.t())
        return of_x(x), w, None if y is None else of_y(y)

    return describe
