"""``dx``, ``dA`` and ``dB`` of a LoRA linear layer.

Where helper CTAs pay, ``ds`` and ``dB`` are made beside the GEMM of dx, which takes ds in its last
step, and ``dA`` behind them; under dropout ``dA`` has a launch of its own. Elsewhere they are
``expand_backward``, ``shrink_backward`` and ``linear_expand``.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from lorafast.kernels.common.bundles import Mask, Matrix, Sum
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.counters import counters
from lorafast.kernels.common.device import cast, raise_flag, wait_for
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
from lorafast.kernels.common.plan import (
    LoraLinearBackwardLaunch,
    group_rows,
    lora_linear_backward_launch,
    tma_fits,
)
from lorafast.kernels.common.start import Start, key_of
from lorafast.kernels.expand_backward import expand_backward
from lorafast.kernels.expand_backward.kernel import expand_backward_group
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
    tile_count,
    tile_of,
)
from lorafast.kernels.shrink_backward import shrink_backward
from lorafast.kernels.shrink_backward.kernel import launcher as launcher_of_dA
from lorafast.kernels.shrink_backward.kernel import shrink_backward_columns
from torch import Tensor

from lorafast.core.problem import Layout


@triton.jit(do_not_specialize=["M", "r", "waves", "m_blocks", "threshold"])
def lora_linear_backward_kernel(
    dy,
    w,
    dx,
    dy_ptr,
    x_ptr,
    a_ptr,
    b_ptr,
    s_ptr,
    ds_ptr,
    da_ptr,
    db_ptr,
    dbias_ptr,
    ds_partials_ptr,
    db_partials_ptr,
    dbias_partials_ptr,
    seed_ptr,
    counters_ptr,
    M,
    N,
    K,
    r,
    waves,
    m_blocks,
    threshold,
    scaling,
    survivor_scale,
    stride_dym,
    stride_dyn,
    stride_wn,
    stride_wk,
    stride_xm,
    stride_xk,
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
    HELPER_M: tl.constexpr,
    HELPER_N: tl.constexpr,
    HELPER_R: tl.constexpr,
    HELPER_STAGES: tl.constexpr,
    COLUMNS_M: tl.constexpr,
    COLUMNS_K: tl.constexpr,
    COLUMNS_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The tiles are those of ``dx [M, K] = dy [M, N] · W``, whose inner dimension is N.

    They read dy and W and write dx by ``dy``, ``w`` and ``dx``, descriptors or pointers; the helpers
    read dy by ``dy_ptr``.

    The helpers' first items are row groups by column groups of dy: a row group's flag says that its ds
    is there. Then, without dropout, come column blocks of x for dA, which need all of ds.
    """
    a_columns = Matrix(a_ptr, stride_ak, stride_ar)  # Aᵀ [K, r]
    mask = Mask(seed_ptr, threshold, survivor_scale) if seed_ptr is not None else None
    if not DESCRIPTORS:
        dy = Matrix(dy, stride_dym, stride_dyn)
        w = Matrix(w, stride_wk, stride_wn)  # Wᵀ [K, N]
    programs = tl.num_programs(0)
    program = tl.atomic_add(counters_ptr + TICKETS, 1, sem="relaxed")
    rows_of_group = m_blocks * HELPER_M
    row_groups = tl.cdiv(M, rows_of_group)
    col_groups = tl.cdiv(N, HELPER_N)
    flags_ptr = counters_ptr + FLAGS
    first_round = 0
    if program < HELPERS:
        groups = row_groups * col_groups
        items = groups
        if mask is None:
            items += tl.cdiv(K, COLUMNS_K)
        item = tl.atomic_add(counters_ptr + ITEMS, 1, sem="relaxed")
        while item < groups:
            completed = expand_backward_group(
                Matrix(dy_ptr, stride_dym, stride_dyn),
                Matrix(s_ptr, stride_sm, stride_sr), Matrix(b_ptr, stride_bn, stride_br),
                ds_ptr, ds_partials_ptr, Sum(db_ptr, db_partials_ptr),
                Sum(dbias_ptr, dbias_partials_ptr) if dbias_ptr is not None else None,
                flags_ptr + row_groups, item // col_groups, item % col_groups, 0,
                row_groups, col_groups, 1, M, N, r, m_blocks, scaling,
                HELPER_M, HELPER_N, HELPER_R, HELPER_STAGES, PRECISION, INTERPRETED,
            )  # fmt: skip
            if completed:
                raise_flag(flags_ptr + item // col_groups)
            item = tl.atomic_add(counters_ptr + ITEMS, 1, sem="relaxed")
        if mask is None:
            ds_ready = ds_ptr
            if item < items:
                for group in range(0, row_groups):
                    ds_ready += wait_for(flags_ptr + group, INTERPRETED)
            ranks = tl.arange(0, HELPER_R)
            while item < items:
                first_col = (item - groups) * COLUMNS_K
                da = shrink_backward_columns(
                    Matrix(ds_ready, r, 1), Matrix(x_ptr, stride_xm, stride_xk), None,
                    first_col, ranks, 0, M, K, r,
                    COLUMNS_M, COLUMNS_K, COLUMNS_STAGES, PRECISION, INTERPRETED,
                )  # fmt: skip
                cols = first_col + tl.arange(0, COLUMNS_K)
                tl.store(
                    da_ptr + ranks.to(tl.int64)[:, None] * K + cols[None, :],
                    cast(da, da_ptr.dtype.element_ty, INTERPRETED),
                    mask=(ranks < r)[:, None] & (cols < K)[None, :],
                )
                item = tl.atomic_add(counters_ptr + ITEMS, 1, sem="relaxed")
        first_round = waves

    n_blocks = tl.cdiv(N, BLOCK_K)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(K, BLOCK_N)
    rounds = tile_count(program, programs, tiles, waves, HELPERS)
    for i in tl.range(first_round, rounds, flatten=FLATTEN):
        tile = tile_of(i, program, programs, waves, HELPERS)
        row_block, col_block = tile_at(tile, M, K, BLOCK_M, BLOCK_N, GROUP_M)
        acc = multiply(
            dy, w, row_block, col_block, 0, n_blocks, M, K, N,
            BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS, N_MAJOR, WARP_SPECIALIZE,
            PRECISION, INTERPRETED,
        )  # fmt: skip
        flag_ptr = flags_ptr + row_block * BLOCK_M // rows_of_group
        ds_of_tile = Matrix(ds_ptr + wait_for(flag_ptr, INTERPRETED), r, 1)
        if mask is None:
            rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
            cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
            acc = add_low_rank(
                acc, ds_of_tile, a_columns, rows, cols, M, K, r, 1.0,
                BLOCK_R, RANK_BLOCKS, PRECISION, INTERPRETED,
            )  # fmt: skip
        finish(
            acc, dx, ds_of_tile, a_columns, None, mask, row_block, col_block * BLOCK_N, M, K, r, 1.0,
            BLOCK_R, RANK_BLOCKS, PARTS, DESCRIPTORS, PRECISION, INTERPRETED,
        )  # fmt: skip
    clear_when_last(counters_ptr, row_groups + FLAGS, programs)


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
        rule_for("expand_backward", dy, M, N, N, r), rule_for("shrink_backward", dy, M, K, K, r),
        M, K, N, r,
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
    gemm, helpers, rows, columns = launch.gemm, launch.helpers, launch.rows, launch.columns
    M, N, K, r = gemm.M, gemm.K, gemm.N, gemm.r
    col_groups, row_groups = launch.groups
    start = Start(lora_linear_backward_kernel, (helpers.programs,), gemm.config.options)
    operands = operands_of(gemm)
    used = FLAGS.value + 2 * row_groups + col_groups
    of_dA = launch.shrink_backward
    shrink_backward_alone = None if of_dA is None else launcher_of_dA(of_dA, dtype)
    m_blocks = group_rows(gemm.config) // rows.block_m
    blocks = (
        *blocks_of(gemm), helpers.helpers, rows.block_m, rows.block_n, rows.block_r, rows.num_stages,
        columns.block_m, columns.block_k, columns.num_stages, gemm.precision, INTERPRETED,
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
        dA = torch.empty((r, K), dtype=dtype, device=device)
        dB = torch.empty((N, r), dtype=dtype, device=device)
        ds_partials = torch.empty((col_groups, M, r), dtype=torch.float32, device=device)
        dB_partials = torch.empty((row_groups, N, r), dtype=torch.float32, device=device)
        dbias = dbias_partials = None
        if launch.dbias:
            dbias = torch.empty((N,), dtype=dy.dtype, device=device)
            dbias_partials = torch.empty((row_groups, N), dtype=torch.float32, device=device)
        of_dropout = mask_of(dropout_p, seed) if gemm.dropout else NO_MASK
        strides = (
            *dy.stride(), *weight.stride(), *x.stride(), *lora_A.stride(), *lora_B.stride(), *s.stride(),
        )  # fmt: skip
        start(
            key_of(strides, tensors=(dy, x, weight, lora_A, lora_B, s, of_dropout[0])),
            *operands(dy, weight, dx), dy, x, lora_A, lora_B, s, ds, dA, dB, dbias,
            ds_partials, dB_partials, dbias_partials, of_dropout[0], counters(dy, used),
            M, N, K, r, helpers.waves, m_blocks, of_dropout[1], float(scaling), of_dropout[2],
            *strides, *blocks,
        )  # fmt: skip
        if shrink_backward_alone is not None:
            dA = shrink_backward_alone(ds, x, dropout_p, seed)
        return dx, None, dA, dB, dbias

    return run
