"""``y = x·Wᵀ + scaling · (x·Aᵀ)·Bᵀ + bias`` and ``s = x·Aᵀ`` of at most 16 rows, in one launch.

W is dense or read as codes (``linear_expand.codes_tile``). Helpers, the first programs, each shrink a
share of K for a block of the rank; the last one of a block adds the shares up and says so. The others
multiply meanwhile, K cut as in ``linear_expand``. Who ends a tile looks whether ``s`` is there, a few
times at most. If it isn't, he makes it from x and A by the same sums in the same order: the bits are the
same, and nobody waits for a program that may not have started. Where K is short there are no helpers,
and every tile does so.

Counters: blocks of the rank that are there; who has looked at that, or is done with saying so; programs
that have arrived, for each block of the rank and for each tile. Their last one clears the first two.
"""

import functools
from collections.abc import Callable, Hashable

import torch
import triton
import triton.language as tl
from lorafast.kernels.common.bundles import Matrix, Vector
from lorafast.kernels.common.counters import counters
from lorafast.kernels.common.decode_plan import HELPER_STAGES, DecodeLaunch
from lorafast.kernels.common.device import arrive, cast, dot, sum_blocks
from lorafast.kernels.common.launch import INTERPRETED, KEPT, on_its_device
from lorafast.kernels.common.start import Start, key_of
from lorafast.kernels.dequantize.kernel import stored_in
from lorafast.kernels.linear_expand.codes import constants_of
from lorafast.kernels.linear_expand.codes_tile import multiply_codes, scale_columns
from lorafast.kernels.linear_expand.tile import finish, multiply
from lorafast.kernels.shrink.kernel import shrink_rows
from torch import Tensor

from lorafast.operands import Weight
from lorafast.reference import wide

READY, SEEN, ARRIVED = (tl.constexpr(i) for i in range(3))
"""Slots of the counters; those of blocks and tiles begin at the last one."""
_LOOKS = tl.constexpr(8)
"""How often a tile looks whether ``s`` is there: as long as making it takes at K = 4096, about 6 µs."""


@triton.jit
def _share_of_s(
    x,
    a,
    rows,
    ranks,
    share,
    M,
    K,
    r,
    SHARES: tl.constexpr,
    HELPER_K: tl.constexpr,
    HELPER_STAGES: tl.constexpr,
    SKINNY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``x·Aᵀ`` of these ranks in float32, over one of SHARES shares of K."""
    blocks = tl.cdiv(K, HELPER_K)
    # Counted in blocks, so that the compiler knows the alignment of every load.
    begin = blocks * share // SHARES * HELPER_K
    end = tl.minimum(blocks * (share + 1) // SHARES * HELPER_K, K)
    return shrink_rows(
        x, a, None, rows, ranks, begin, end, M, K, r, HELPER_K, HELPER_STAGES, SKINNY, INTERPRETED,
    )  # fmt: skip


@triton.jit
def _help(
    program,
    x,
    a,
    s_ptr,
    shares_ptr,
    counters_ptr,
    rows,
    M,
    K,
    r,
    users,
    BLOCK_R: tl.constexpr,
    SHARES: tl.constexpr,
    HELPER_K: tl.constexpr,
    HELPER_STAGES: tl.constexpr,
    SKINNY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Share p % SHARES of the block p // SHARES of the rank; its last share adds them up."""
    rank_block = program // SHARES
    share = program % SHARES
    ranks = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = _share_of_s(
        x, a, rows, ranks, share, M, K, r, SHARES, HELPER_K, HELPER_STAGES, SKINNY, INTERPRETED
    )
    offsets = rows[:, None] * r + ranks[None, :]  # [BLOCK_M, BLOCK_R]
    inside = (rows < M)[:, None] & (ranks < r)[None, :]
    tl.store(shares_ptr + share * M * r + offsets, acc, mask=inside)
    if arrive(counters_ptr + ARRIVED + rank_block) == SHARES - 1:
        total = tl.zeros((rows.shape[0], BLOCK_R), dtype=tl.float32)
        for i in tl.static_range(SHARES):
            total += tl.load(shares_ptr + i * M * r + offsets, mask=inside, other=0.0)
        tl.store(s_ptr + offsets, cast(total, s_ptr.dtype.element_ty, INTERPRETED), mask=inside)
        tl.store(counters_ptr + ARRIVED + rank_block, 0)
        arrive(counters_ptr + READY)
        _clear_when_last(counters_ptr, users)


@triton.jit
def _own(
    x,
    a,
    rows,
    ranks,
    M,
    K,
    r,
    dtype: tl.constexpr,
    SHARES: tl.constexpr,
    HELPER_K: tl.constexpr,
    HELPER_STAGES: tl.constexpr,
    SKINNY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``s`` of these ranks, added up as helpers add it up."""
    total = tl.zeros((rows.shape[0], ranks.shape[0]), dtype=tl.float32)
    for share in tl.range(0, SHARES, num_stages=1):
        total += _share_of_s(
            x, a, rows, ranks, share, M, K, r, SHARES, HELPER_K, HELPER_STAGES, SKINNY, INTERPRETED
        )
    return cast(total, dtype, INTERPRETED)


@triton.jit
def _blocks_there(counters_ptr, rank_blocks):
    """How many blocks of the rank are in ``s``; looks until all are, a few times."""
    there = 0
    looks = 0
    while (there < rank_blocks) & (looks < _LOOKS):
        there = tl.atomic_add(counters_ptr + READY, 0, sem="acquire", scope="gpu")
        looks += 1
    # No thread loads s before the one that has looked knows.
    tl.debug_barrier()
    return there


@triton.jit
def _clear_when_last(counters_ptr, users):
    """Puts the first two counters back to zero if all others are done with them."""
    if arrive(counters_ptr + SEEN) == users - 1:
        tl.store(counters_ptr + READY, 0)
        tl.store(counters_ptr + SEEN, 0)


@triton.jit
def _add_low_rank(
    acc,
    x,
    a,
    s_ptr,
    b,
    counters_ptr,
    rows,
    cols,
    tile,
    M,
    N,
    K,
    r,
    rank_blocks,
    users,
    scaling,
    BLOCK_R: tl.constexpr,
    SHARES: tl.constexpr,
    HELPER_K: tl.constexpr,
    HELPER_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    SKINNY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``acc + s·(scaling · B)ᵀ``, ``s`` of the helpers or the tile's own; without helpers the first tile
    writes it."""
    dtype: tl.constexpr = s_ptr.dtype.element_ty
    if SHARES > 0:
        there = _blocks_there(counters_ptr, rank_blocks)
    b_cols = b.ptr + cols.to(tl.int64)[None, :] * b.stride_row  # [1, BLOCK_N]
    for first in tl.range(0, r, BLOCK_R, num_stages=1):
        ranks = first + tl.arange(0, BLOCK_R)
        offsets = rows[:, None] * r + ranks[None, :]  # [BLOCK_M, BLOCK_R]
        inside = (rows < M)[:, None] & (ranks < r)[None, :]
        if SHARES > 0:
            if there == rank_blocks:
                s = tl.load(s_ptr + offsets, mask=inside, other=0.0)
            else:
                s = _own(
                    x, a, rows, ranks, M, K, r, dtype, SHARES,
                    HELPER_K, HELPER_STAGES, SKINNY, INTERPRETED,
                )  # fmt: skip
        else:
            s = _own(
                x, a, rows, ranks, M, K, r, dtype, 1, HELPER_K, HELPER_STAGES, SKINNY, INTERPRETED
            )
            if tile == 0:
                tl.store(s_ptr + offsets, s, mask=inside)
        b_tile = tl.load(
            b_cols + ranks.to(tl.int64)[:, None] * b.stride_col,
            mask=(cols < N)[None, :] & (ranks < r)[:, None],
            other=0.0,
        )  # [BLOCK_R, BLOCK_N]
        b_tile = cast(b_tile.to(tl.float32) * scaling, dtype, INTERPRETED)
        acc = dot(s, b_tile, acc, PRECISION, INTERPRETED)
    if SHARES > 0:
        _clear_when_last(counters_ptr, users)
    return acc


@triton.jit(do_not_specialize=["M", "rank_blocks", "users", "scales_in_row"])
def lora_linear_decode_kernel(
    x_ptr,
    w_ptr,
    numbers_ptr,
    scales_ptr,
    map_ptr,
    of_blocks_ptr,
    offset_ptr,
    y_ptr,
    a_ptr,
    s_ptr,
    b_ptr,
    bias_ptr,
    shares_ptr,
    partials_ptr,
    counters_ptr,
    M,
    N,
    K,
    r,
    rank_blocks,
    users,
    scales_in_row,
    unit,
    scaling,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    stride_bias,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARES: tl.constexpr,
    HELPER_K: tl.constexpr,
    HELPER_STAGES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    LOW_FIRST: tl.constexpr,
    HARDWARE: tl.constexpr,
    GROUP: tl.constexpr,
    STORED: tl.constexpr,
    APART: tl.constexpr,
    PRECISION: tl.constexpr,
    SKINNY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """First the helpers, SHARES for each block of the rank; then program p has share p % SPLITS of tile
    p // SPLITS. GROUP is 0 of a dense W, SHARES where there are no helpers; ``users`` look at the first
    two counters."""
    x = Matrix(x_ptr, stride_xm, stride_xk)
    a = Matrix(a_ptr, stride_ar, stride_ak)
    b = Matrix(b_ptr, stride_bn, stride_br)
    bias = Vector(bias_ptr, stride_bias) if bias_ptr is not None else None
    rows = tl.arange(0, BLOCK_M)
    program = tl.program_id(0)
    helpers = rank_blocks * SHARES
    if SHARES > 0:
        is_helper = program < helpers
        if is_helper:
            _help(
                program, x, a, s_ptr, shares_ptr, counters_ptr, rows, M, K, r, users,
                BLOCK_R, SHARES, HELPER_K, HELPER_STAGES, SKINNY, INTERPRETED,
            )  # fmt: skip
    if program >= helpers:
        tile = (program - helpers) // SPLITS
        share = (program - helpers) % SPLITS
        k_blocks = tl.cdiv(K, BLOCK_K)
        begin = k_blocks * share // SPLITS
        end = k_blocks * (share + 1) // SPLITS
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if GROUP > 0:
            acc = multiply_codes(
                acc, x, w_ptr, numbers_ptr, scales_ptr, map_ptr, of_blocks_ptr, offset_ptr, unit,
                scales_in_row, rows, tile * BLOCK_N, begin, end, M, N, K, False, BLOCK_N, BLOCK_K,
                BLOCK_ROWS, BLOCK_COLS, NESTED_BLOCK, LOW_FIRST, HARDWARE, GROUP, STORED, APART,
                PRECISION, INTERPRETED,
            )  # fmt: skip
        else:
            acc = multiply(
                acc, x, Matrix(w_ptr, stride_wn, stride_wk), 0, tile, begin, end, M, N, K,
                BLOCK_M, BLOCK_N, BLOCK_K, False, False, PRECISION, INTERPRETED,
            )  # fmt: skip
        last = True
        if partials_ptr is not None:
            offsets = rows.to(tl.int64)[:, None] * N + cols[None, :]  # [BLOCK_M, BLOCK_N]
            inside = (rows < M)[:, None] & (cols < N)[None, :]
            size = tl.cast(M, tl.int64) * N
            counter = counters_ptr + ARRIVED + (rank_blocks if SHARES > 0 else 0) + tile
            tl.store(partials_ptr + share * size + offsets, acc, mask=inside)
            last = arrive(counter) == SPLITS - 1
            if last:
                acc = sum_blocks(partials_ptr, offsets, inside, size, SPLITS)
                tl.store(counter, 0)
        if last:
            if APART:
                acc = scale_columns(acc, scales_ptr, unit, cols, N, False, BLOCK_ROWS)
            acc = _add_low_rank(
                acc, x, a, s_ptr, b, counters_ptr, rows, cols, tile, M, N, K, r,
                rank_blocks, users, scaling,
                BLOCK_R, SHARES, HELPER_K, HELPER_STAGES, PRECISION, SKINNY, INTERPRETED,
            )  # fmt: skip
            finish(acc, y_ptr, bias, 0, tile * BLOCK_N, M, N, 1, False, INTERPRETED)


@functools.lru_cache(maxsize=KEPT)
def launcher(launch: DecodeLaunch) -> Callable[..., tuple[Tensor, Tensor]]:
    """What launches it: of ``x, weight, lora_A, lora_B, scaling, bias``, and a dropout that is none."""
    c, M, K, N, r = launch.config, launch.M, launch.K, launch.N, launch.r
    start = Start(lora_linear_decode_kernel, (launch.programs,), c.options)
    blocks = (
        c.block_m, c.block_n, c.block_k, c.block_r, launch.splits, launch.shares, launch.helper_k,
        HELPER_STAGES,
    )  # fmt: skip
    used = 2 + launch.tiles + (launch.rank_blocks if launch.shares else 0)

    @on_its_device
    def run(
        x: Tensor,
        weight: Weight,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        bias: Tensor | None = None,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        y = torch.empty((M, N), dtype=x.dtype, device=x.device)
        s = torch.empty((M, r), dtype=wide(x.dtype), device=x.device)
        shares = partials = zeros = None
        if launch.shares:
            shares = torch.empty((launch.shares, M, r), dtype=torch.float32, device=x.device)
        if launch.splits > 1:
            partials = torch.empty((launch.splits, M, N), dtype=torch.float32, device=x.device)
        if launch.shares or launch.splits > 1:
            zeros = counters(x, used)
        tensors: tuple[Tensor | None, ...]
        constants: tuple[Hashable, ...]
        if isinstance(weight, Tensor):
            tensors, strides_of_w = (weight, *[None] * 5), weight.stride()
            constants, in_row, unit = (0, 0, None, False, False, 0, "", False), 0, 1.0
        else:
            w = stored_in(weight)
            tensors, strides_of_w = w.tensors, (K, 1)
            constants, in_row, unit = constants_of(w, x, launch.group), w.scales_in_row, w.unit
        strides = (
            *x.stride(), *strides_of_w, *lora_A.stride(), *lora_B.stride(),
            None if bias is None else bias.stride(0),
        )  # fmt: skip
        start(
            key_of(strides, constants, in_row, tensors=(x, *tensors, lora_A, lora_B, bias)),
            x, *tensors, y, lora_A, s, lora_B, bias, shares, partials, zeros, M, N, K, r,
            launch.rank_blocks, launch.rank_blocks + launch.tiles, in_row, unit, float(scaling),
            *strides, *blocks, *constants, launch.precision, launch.skinny, INTERPRETED,
        )  # fmt: skip
        return y, s

    return run
