"""``dx``, ``dA`` and ``dB`` of a LoRA linear layer.

Where helpers pay, ``ds`` and ``dB`` are made beside the product of dx, which takes ds in its last
step, and ``dA`` behind them; under dropout ``dA`` has a launch of its own. Elsewhere they are
``expand_backward``, ``shrink_backward`` and ``linear_expand``.
"""

import torch
import triton
import triton.language as tl
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.counters import counters
from lorafast.kernels.common.device import cast, raise_flag, wait_for
from lorafast.kernels.common.launch import (
    INTERPRETED,
    config_for,
    dropout_arguments,
    on_device,
    precision,
    processors,
    rule_for,
)
from lorafast.kernels.common.plan import backward_helpers, group_rows, may_help
from lorafast.kernels.expand_backward import expand_backward
from lorafast.kernels.expand_backward.kernel import expand_backward_group
from lorafast.kernels.linear_expand import linear_expand
from lorafast.kernels.linear_expand.tile import (
    add_low_rank,
    bulk_copies,
    finish,
    multiply,
    tile_arguments,
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
from lorafast.kernels.shrink_backward.kernel import shrink_backward_columns
from torch import Tensor


@triton.jit(do_not_specialize=["M", "r", "waves", "m_blocks", "threshold"])
def lora_linear_backward_kernel(
    x,
    w,
    y,
    dy_ptr,
    x_ptr,
    a_ptr,
    b_ptr,
    s_ptr,
    ds_ptr,
    da_ptr,
    db_ptr,
    ds_partials_ptr,
    db_partials_ptr,
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
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_rows,
    stride_cols,
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
    TRANSPOSED: tl.constexpr,
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
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The product is ``dx [M, K] = dy [M, N] · W``: its operands are x = dy, w = Wᵀ, y = dx.

    The helpers' first items are row groups by column groups of dy: a row group's flag says that its ds
    is there. Then, without dropout, come column blocks of x for dA, which need all of ds.
    """
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
        if not HAS_DROPOUT:
            items += tl.cdiv(K, COLUMNS_K)
        item = tl.atomic_add(counters_ptr + ITEMS, 1, sem="relaxed")
        while item < groups:
            completed = expand_backward_group(
                dy_ptr, s_ptr, b_ptr, ds_ptr, db_ptr, ds_partials_ptr, db_partials_ptr,
                flags_ptr + row_groups, item // col_groups, item % col_groups, 0,
                row_groups, col_groups, 1, M, N, r, m_blocks, scaling,
                stride_xm, stride_xk, stride_sm, stride_sr, stride_bn, stride_br,
                HELPER_M, HELPER_N, HELPER_R, HELPER_STAGES, True, PRECISION, INTERPRETED,
            )  # fmt: skip
            if completed:
                raise_flag(flags_ptr + item // col_groups)
            item = tl.atomic_add(counters_ptr + ITEMS, 1, sem="relaxed")
        if not HAS_DROPOUT:
            ds_ready = ds_ptr
            if item < items:
                for group in range(0, row_groups):
                    ds_ready += wait_for(flags_ptr + group, INTERPRETED)
            ranks = tl.arange(0, HELPER_R)
            while item < items:
                first_col = (item - groups) * COLUMNS_K
                da = shrink_backward_columns(
                    ds_ready, x_ptr, x_ptr, first_col, ranks, 0, M, K, r, 0, 1.0,
                    r, 1, stride_rows, stride_cols,
                    COLUMNS_M, COLUMNS_K, COLUMNS_STAGES, False, PRECISION, INTERPRETED,
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
            x, w, row_block, col_block, 0, n_blocks, M, K, N,
            stride_xm, stride_xk, stride_wn, stride_wk,
            BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS, TRANSPOSED, WARP_SPECIALIZE,
            PRECISION, INTERPRETED,
        )  # fmt: skip
        flag_ptr = flags_ptr + row_block * BLOCK_M // rows_of_group
        ds_ready = ds_ptr + wait_for(flag_ptr, INTERPRETED)
        if not HAS_DROPOUT:
            rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
            cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
            acc = add_low_rank(
                acc, ds_ready, a_ptr, rows, cols, M, K, r, 1.0,
                r, 1, stride_ak, stride_ar, BLOCK_R, RANK_BLOCKS, PRECISION, INTERPRETED,
            )  # fmt: skip
        finish(
            acc, y, ds_ready, a_ptr, x_ptr, seed_ptr, row_block, col_block * BLOCK_N, M, K, r,
            threshold, 1.0, survivor_scale, r, 1, stride_ak, stride_ar, 1,
            BLOCK_R, RANK_BLOCKS, PARTS, DESCRIPTORS, False, HAS_DROPOUT, PRECISION, INTERPRETED,
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
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dx = dy·W + drop'(ds·A)``, ``dA = dsᵀ·drop(x)``, ``dB = scaling · dyᵀ·s``, with
    ``ds = scaling · dy·B``.

    Shapes: ``dy [M, N]``, ``x [M, K]``, ``weight [N, K]``, ``lora_A [r, K]``, ``lora_B [N, r]``,
    ``s [M, r]`` → ``dx [M, K]``, ``dA [r, K]``, ``dB [N, r]``, each in the dtype of its argument.
    """
    (M, N), (r, K) = dy.shape, lora_A.shape
    masked = dropout_p > 0.0
    bulk = bulk_copies(dy, weight.t())
    # The product is that of dx: its K is the layer's N.
    c = config or config_for(
        "lora_linear_backward", dy, M, N, K, r,
        adapter_dtype=lora_A.dtype, masked=masked, transposed=True, bulk=bulk,
    )  # fmt: skip
    rows = rule_for("expand_backward", dy, M, N, N, r)
    cols = rule_for("shrink_backward", dy, M, K, K, r)
    size = dy.element_size()
    helpers = None
    if may_help(dy.dtype):
        helpers = backward_helpers(c, rows, cols, M, K, N, r, size, masked, processors(dy))
    if helpers is None:
        ds, dB = expand_backward(dy, s, lora_B, scaling)
        dA = shrink_backward(ds, x, dropout_p, seed, lora_A.dtype)
        dx = linear_expand(
            dy, weight.t(), ds, lora_A.t(), 1.0, None, dropout_p, seed, config=config
        )
        return dx, dA, dB
    row_groups, col_groups = triton.cdiv(M, group_rows(c)), triton.cdiv(N, rows.block_n)
    dx = torch.empty((M, K), device=dy.device, dtype=dy.dtype)
    ds = torch.empty((M, r), device=dy.device, dtype=dy.dtype)
    dA = torch.empty((r, K), device=dy.device, dtype=lora_A.dtype)
    dB = torch.empty((N, r), device=dy.device, dtype=lora_B.dtype)
    with on_device(dy):
        lora_linear_backward_kernel[(helpers.programs,)](
            dy_ptr=dy,
            x_ptr=x,
            a_ptr=lora_A,
            b_ptr=lora_B,
            s_ptr=s,
            ds_ptr=ds,
            da_ptr=dA,
            db_ptr=dB,
            ds_partials_ptr=dy.new_empty((col_groups, M, r), dtype=torch.float32),
            db_partials_ptr=dy.new_empty((row_groups, N, r), dtype=torch.float32),
            counters_ptr=counters(dy, FLAGS.value + 2 * row_groups + col_groups),
            M=M,
            N=N,
            K=K,
            r=r,
            waves=helpers.waves,
            m_blocks=group_rows(c) // rows.block_m,
            scaling=float(scaling),
            stride_rows=x.stride(0),
            stride_cols=x.stride(1),
            stride_ar=lora_A.stride(0),
            stride_ak=lora_A.stride(1),
            stride_bn=lora_B.stride(0),
            stride_br=lora_B.stride(1),
            stride_sm=s.stride(0),
            stride_sr=s.stride(1),
            HELPERS=helpers.helpers,
            HELPER_M=rows.block_m,
            HELPER_N=rows.block_n,
            HELPER_R=rows.block_r,
            HELPER_STAGES=rows.num_stages,
            COLUMNS_M=cols.block_m,
            COLUMNS_K=cols.block_k,
            COLUMNS_STAGES=cols.num_stages,
            PRECISION=precision(dy),
            INTERPRETED=INTERPRETED,
            **tile_arguments(dy, weight.t(), dx, r, masked, c),
            **dropout_arguments(dy, dropout_p, seed),
        )
    if dropout_p:
        dA = shrink_backward(ds, x, dropout_p, seed, lora_A.dtype)
    return dx, dA, dB
