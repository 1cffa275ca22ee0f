"""``dx``, ``dA`` and ``dB`` of a LoRA linear layer.

Where helper CTAs pay, ``ds`` and the parts of ``dB`` are made beside the GEMM of dx, which takes ds in
its last step; adding up ``dB``, and ``dA``, are launches of their own. Elsewhere they are
``expand_backward``, ``shrink_backward`` and ``linear_expand``.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from lorafast.kernels.common import sum_partials
from lorafast.kernels.common.bundles import Matrix
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.counters import counters
from lorafast.kernels.common.device import cast, dot, raise_flag, wait_for
from lorafast.kernels.common.launch import (
    INTERPRETED,
    KEPT,
    on_its_device,
    precision,
    rule_for,
    sms,
)
from lorafast.kernels.common.plan import (
    LoraLinearBackwardLaunch,
    lora_linear_backward_launch,
    tma_fits,
)
from lorafast.kernels.common.start import Start, key_of
from lorafast.kernels.expand_backward import expand_backward
from lorafast.kernels.linear_expand import linear_expand
from lorafast.kernels.linear_expand.tile import (
    add_low_rank,
    blocks_of,
    finish,
    multiply,
    operands_of,
    tile_at,
)
from lorafast.kernels.lora_linear.helpers import (
    FLAGS,
    ITEMS,
    TICKETS,
    clear_when_last,
    read_factor,
    read_rows,
    tile_count,
    tile_of,
)
from lorafast.kernels.shrink_backward import shrink_backward
from lorafast.kernels.shrink_backward.kernel import launcher as launcher_of_dA
from torch import Tensor

from lorafast.core.problem import Layout


@triton.jit
def expand_backward_row_block(
    dy,
    s,
    b,
    db_partials_ptr,
    dbias_partials_ptr,
    row_block,
    ranks,
    M,
    N,
    r,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``dy·B`` in float32 of a row block of dy, for ``ranks``.

    Leaves the row block's part of ``dyᵀ·s`` in ``db_partials [row blocks, N, r]``, and of ``Σ dy`` in
    ``dbias_partials [row blocks, N]`` unless that is None.
    """
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    s_tile = read_factor(s, rows, ranks, M, r, s.ptr.dtype.element_ty, INTERPRETED)
    first = tl.cast(row_block, tl.int64) * N
    acc = tl.zeros((BLOCK_M, ranks.shape[0]), dtype=tl.float32)
    for block in tl.range(0, tl.cdiv(N, BLOCK_K), num_stages=STAGES):
        dy_tile = read_rows(dy, row_block, block, M, N, BLOCK_M, BLOCK_K, DESCRIPTORS)
        cols = block * BLOCK_K + tl.arange(0, BLOCK_K)
        b_tile = read_factor(b, cols, ranks, N, r, dy_tile.dtype, INTERPRETED)
        # Apart: with a sum that stays in flight over the loop ptxas serializes every wgmma of the kernel.
        acc = dot(dy_tile, b_tile, acc, PRECISION, INTERPRETED, APART=True)
        db = tl.zeros((BLOCK_K, ranks.shape[0]), dtype=tl.float32)
        db = dot(tl.trans(dy_tile), s_tile, db, PRECISION, INTERPRETED)
        tl.store(
            db_partials_ptr + (first + cols)[:, None] * r + ranks[None, :],
            db,
            mask=(cols < N)[:, None] & (ranks < r)[None, :],
        )
        if dbias_partials_ptr is not None:
            dbias = tl.sum(dy_tile.to(tl.float32), axis=0)
            tl.store(dbias_partials_ptr + first + cols, dbias, mask=cols < N)
    return acc


@triton.jit(do_not_specialize=["M", "r", "waves"])
def lora_linear_backward_kernel(
    dy,
    w,
    dx,
    a_ptr,
    b_ptr,
    s_ptr,
    ds_ptr,
    db_partials_ptr,
    dbias_partials_ptr,
    counters_ptr,
    M,
    N,
    K,
    r,
    waves,
    scaling,
    stride_dym,
    stride_dyn,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    stride_sm,
    stride_sr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    N_MAJOR: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    FLATTEN: tl.constexpr,
    HELPERS: tl.constexpr,
    HELPER_R: tl.constexpr,
    HELPER_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The tiles are those of ``dx [M, K] = dy [M, N] · W``, whose inner dimension is N.

    An item of the helpers is a row block of dy; its flag says that its ds is there. ``dy``, ``w`` and
    ``dx`` are descriptors or pointers.
    """
    a_columns = Matrix(a_ptr, stride_ak, stride_ar)  # Aᵀ [K, r]
    if not DESCRIPTORS:
        dy = Matrix(dy, stride_dym, stride_dyn)
        w = Matrix(w, stride_wk, stride_wn)  # Wᵀ [K, N]
    programs = tl.num_programs(0)
    program = tl.atomic_add(counters_ptr + TICKETS, 1, sem="relaxed")
    row_blocks = tl.cdiv(M, BLOCK_M)
    first_round = 0
    if program < HELPERS:
        ranks = tl.arange(0, HELPER_R)
        item = tl.atomic_add(counters_ptr + ITEMS, 1, sem="relaxed")
        while item < row_blocks:
            ds = expand_backward_row_block(
                dy, Matrix(s_ptr, stride_sm, stride_sr), Matrix(b_ptr, stride_bn, stride_br),
                db_partials_ptr, dbias_partials_ptr, item, ranks, M, N, r,
                BLOCK_M, BLOCK_K, HELPER_STAGES, DESCRIPTORS, PRECISION, INTERPRETED,
            )  # fmt: skip
            rows = item * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(
                ds_ptr + rows.to(tl.int64)[:, None] * r + ranks[None, :],
                cast(ds * scaling, ds_ptr.dtype.element_ty, INTERPRETED),
                mask=(rows < M)[:, None] & (ranks < r)[None, :],
            )
            raise_flag(counters_ptr + FLAGS + item)
            item = tl.atomic_add(counters_ptr + ITEMS, 1, sem="relaxed")
        first_round = waves

    n_blocks = tl.cdiv(N, BLOCK_K)
    tiles = row_blocks * tl.cdiv(K, BLOCK_N)
    rounds = tile_count(program, programs, tiles, waves, HELPERS)
    for i in tl.range(first_round, rounds, flatten=FLATTEN):
        tile = tile_of(i, program, programs, waves, HELPERS)
        row_block, col_block = tile_at(tile, M, K, BLOCK_M, BLOCK_N, GROUP_M)
        acc = multiply(
            dy, w, row_block, col_block, 0, n_blocks, M, K, N,
            BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS, N_MAJOR, WARP_SPECIALIZE,
            PRECISION, INTERPRETED,
        )  # fmt: skip
        ds_ready = Matrix(ds_ptr + wait_for(counters_ptr + FLAGS + row_block, INTERPRETED), r, 1)
        rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = add_low_rank(
            acc, ds_ready, a_columns, rows, cols, M, K, r, 1.0,
            BLOCK_R, RANK_BLOCKS, PRECISION, INTERPRETED,
        )  # fmt: skip
        finish(
            acc, dx, ds_ready, a_columns, None, None, row_block, col_block * BLOCK_N, M, K, r, 1.0,
            BLOCK_R, RANK_BLOCKS, PARTS, DESCRIPTORS, PRECISION, INTERPRETED,
        )  # fmt: skip
    clear_when_last(counters_ptr, row_blocks + FLAGS, programs)


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    dbias: bool = False,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``dx = dy·W + drop'(ds·A)``, ``dA = dsᵀ·drop(x)``, ``dB = scaling · dyᵀ·s``, with
    ``ds = scaling · dy·B``, and ``dbias = Σ dy`` over its rows if asked for.

    Shapes: ``dy [M, N]``, ``x [M, K]``, ``weight [N, K]``, ``lora_A [r, K]``, ``lora_B [N, r]``,
    ``s [M, r]`` → ``dx [M, K]``, ``dA [r, K]``, ``dB [N, r]``, each in the dtype of its argument, and
    ``dbias [N]`` in that of ``dy``.
    """
    (M, N), (r, K) = dy.shape, lora_A.shape
    read = Layout.of(weight)
    tma = tma_fits(dy.dtype, Layout.of(dy), read, M, N, K)
    launch = lora_linear_backward_launch(
        # The GEMM is that of dx: its K is the layer's N.
        config or rule_for("lora_linear_backward", dy, M, N, K, r, tma),
        rule_for("shrink_backward", dy, M, K, K, r), M, K, N, r,
        sms=sms(dy), dtype=dy.dtype, precision=precision(dy), tma=tma, by_rows=read.rows > 0,
        dropout=dropout_p > 0.0, dbias=dbias,
    )  # fmt: skip
    if launch is None:
        ds, dB, of_bias = expand_backward(dy, s, lora_B, scaling, dbias=dbias)
        assert ds is not None
        assert dB is not None
        dA = shrink_backward(ds, x, dropout_p, seed, lora_A.dtype)
        dx = linear_expand(
            dy, weight, ds, lora_A.t(), 1.0, None, dropout_p, seed, transposed=True, config=config
        )
        return dx, dA, dB, of_bias
    run = launcher(launch, lora_A.dtype)
    dx, _, dA, dB, of_bias = run(dy, x, weight, lora_A, lora_B, s, scaling, dropout_p, seed)
    return dx, dA, dB, of_bias


Gradients = tuple[Tensor, None, Tensor, Tensor, Tensor | None]
"""``dx``, that of the frozen weight, ``dA``, ``dB``, and ``dbias`` if asked for."""


@functools.lru_cache(maxsize=KEPT)
def launcher(launch: LoraLinearBackwardLaunch, dtype: torch.dtype) -> Callable[..., Gradients]:
    """What launches it: of ``dy, x, weight, lora_A, lora_B, s, scaling, dropout_p, seed``, the last two
    optional; A and B have ``dtype``."""
    gemm, helpers = launch.gemm, launch.helpers
    M, N, K, r = gemm.M, gemm.K, gemm.N, gemm.r
    row_blocks = -(-M // gemm.config.block_m)
    start = Start(lora_linear_backward_kernel, (helpers.programs,), gemm.config.options)
    operands = operands_of(gemm)
    used = FLAGS.value + row_blocks
    shrink_backward_of = launcher_of_dA(launch.shrink_backward, dtype)
    sum_of_dB = sum_partials.launcher(row_blocks, N * r)
    sum_of_dbias = sum_partials.launcher(row_blocks, N)
    blocks = (
        *blocks_of(gemm), helpers.helpers, launch.ranks, launch.stages, gemm.precision, INTERPRETED,
    )  # fmt: skip

    @on_its_device
    def run(
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        s: Tensor,
        scaling: float,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> Gradients:
        device = dy.device
        dx = torch.empty((M, K), dtype=dy.dtype, device=device)
        ds = torch.empty((M, r), dtype=dy.dtype, device=device)
        dB = torch.empty((N, r), dtype=dtype, device=device)
        dB_partials = torch.empty((row_blocks, N, r), dtype=torch.float32, device=device)
        dbias = dbias_partials = None
        if launch.dbias:
            dbias = torch.empty((N,), dtype=dy.dtype, device=device)
            dbias_partials = torch.empty((row_blocks, N), dtype=torch.float32, device=device)
        strides = (
            *dy.stride(), *weight.stride(), *lora_A.stride(), *lora_B.stride(), *s.stride(),
        )  # fmt: skip
        start(
            key_of(strides, tensors=(dy, weight, lora_A, lora_B, s)),
            *operands(dy, weight, dx), lora_A, lora_B, s, ds, dB_partials, dbias_partials,
            counters(dy, used), M, N, K, r, helpers.waves, float(scaling), *strides, *blocks,
        )  # fmt: skip
        sum_of_dB(dB_partials, dB, float(scaling))
        if dbias is not None:
            sum_of_dbias(dbias_partials, dbias, 1.0)
        return dx, None, shrink_backward_of(ds, x), dB, dbias

    return run
