"""``y = x·Wᵀ + scaling · (drop(x)·Aᵀ)·Bᵀ + bias`` and ``s = drop(x)·Aᵀ``.

Where helpers pay it is one launch: they shrink row blocks while the others multiply. Elsewhere it is
``shrink``, then ``linear_expand``.
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
    on_device,
    precision,
    processors,
    rule_for,
)
from lorafast.kernels.common.plan import forward_helpers, may_help
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
from lorafast.kernels.shrink import shrink
from lorafast.kernels.shrink.kernel import shrink_rows
from torch import Tensor


@triton.jit(do_not_specialize=["M", "r", "waves"])
def lora_linear_kernel(
    x,
    w,
    y,
    x_ptr,
    a_ptr,
    s_ptr,
    b_ptr,
    bias_ptr,
    counters_ptr,
    M,
    N,
    K,
    r,
    waves,
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
    RANK_BLOCKS: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    FLATTEN: tl.constexpr,
    HELPERS: tl.constexpr,
    HELPER_K: tl.constexpr,
    HELPER_R: tl.constexpr,
    HELPER_STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """An item of the helpers is a row block of s; its flag says that it is there."""
    programs = tl.num_programs(0)
    program = tl.atomic_add(counters_ptr + TICKETS, 1, sem="relaxed")
    row_blocks = tl.cdiv(M, BLOCK_M)
    first_round = 0
    if program < HELPERS:
        ranks = tl.arange(0, HELPER_R)
        item = tl.atomic_add(counters_ptr + ITEMS, 1, sem="relaxed")
        while item < row_blocks:
            rows = item * BLOCK_M + tl.arange(0, BLOCK_M)
            acc = shrink_rows(
                x_ptr, a_ptr, x_ptr, rows, ranks, 0, K, M, K, r, 0, 1.0,
                stride_xm, stride_xk, stride_ar, stride_ak,
                HELPER_K, HELPER_STAGES, False, PRECISION, INTERPRETED,
            )  # fmt: skip
            tl.store(
                s_ptr + rows.to(tl.int64)[:, None] * r + ranks[None, :],
                cast(acc, s_ptr.dtype.element_ty, INTERPRETED),
                mask=(rows < M)[:, None] & (ranks < r)[None, :],
            )
            raise_flag(counters_ptr + FLAGS + item)
            item = tl.atomic_add(counters_ptr + ITEMS, 1, sem="relaxed")
        first_round = waves

    k_blocks = tl.cdiv(K, BLOCK_K)
    tiles = row_blocks * tl.cdiv(N, BLOCK_N)
    rounds = tile_count(program, programs, tiles, waves, HELPERS)
    for i in tl.range(first_round, rounds, flatten=FLATTEN):
        tile = tile_of(i, program, programs, waves, HELPERS)
        row_block, col_block = tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = multiply(
            x, w, row_block, col_block, 0, k_blocks, M, N, K,
            stride_xm, stride_xk, stride_wn, stride_wk,
            BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS, TRANSPOSED, WARP_SPECIALIZE,
            PRECISION, INTERPRETED,
        )  # fmt: skip
        s_ready = s_ptr + wait_for(counters_ptr + FLAGS + row_block, INTERPRETED)
        rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = add_low_rank(
            acc, s_ready, b_ptr, rows, cols, M, N, r, scaling,
            r, 1, stride_bn, stride_br, BLOCK_R, RANK_BLOCKS, PRECISION, INTERPRETED,
        )  # fmt: skip
        finish(
            acc, y, s_ready, b_ptr, bias_ptr, x_ptr, row_block, col_block * BLOCK_N, M, N, r,
            0, scaling, 1.0, r, 1, stride_bn, stride_br, stride_bias,
            BLOCK_R, RANK_BLOCKS, PARTS, DESCRIPTORS, HAS_BIAS, False, PRECISION, INTERPRETED,
        )  # fmt: skip
    clear_when_last(counters_ptr, row_blocks + FLAGS, programs)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """``y = x·Wᵀ + scaling · (drop(x)·Aᵀ)·Bᵀ + bias`` and ``s = drop(x)·Aᵀ``.

    Shapes: ``x [M, K]``, ``weight [N, K]``, ``lora_A [r, K]``, ``lora_B [N, r]``, ``bias [N]`` →
    ``y [M, N]``, ``s [M, r]``, in the dtype of ``x`` (``s`` in float32 for float16).
    """
    M, K = x.shape
    N, r = lora_B.shape
    masked = dropout_p > 0.0
    bulk = bulk_copies(x, weight)
    c = config or config_for(
        "lora_linear", x, M, K, N, r, adapter_dtype=lora_A.dtype, masked=masked, bulk=bulk
    )
    thin = rule_for("shrink", x, M, K, K, r)
    size = x.element_size()
    helpers = None
    if may_help(x.dtype):
        helpers = forward_helpers(c, thin, M, K, N, r, size, masked, processors(x))
    if helpers is None:
        s = shrink(x, lora_A, dropout_p, seed)
        return linear_expand(x, weight, s, lora_B, scaling, bias, config=config), s
    y = torch.empty((M, N), device=x.device, dtype=x.dtype)
    s = torch.empty((M, r), device=x.device, dtype=x.dtype)
    with on_device(x):
        lora_linear_kernel[(helpers.programs,)](
            x_ptr=x,
            a_ptr=lora_A,
            s_ptr=s,
            b_ptr=lora_B,
            bias_ptr=x if bias is None else bias,
            counters_ptr=counters(x, FLAGS.value + triton.cdiv(M, c.block_m)),
            M=M,
            N=N,
            K=K,
            r=r,
            waves=helpers.waves,
            scaling=float(scaling),
            stride_ar=lora_A.stride(0),
            stride_ak=lora_A.stride(1),
            stride_bn=lora_B.stride(0),
            stride_br=lora_B.stride(1),
            stride_bias=1 if bias is None else bias.stride(0),
            HELPERS=helpers.helpers,
            HELPER_K=thin.block_k,
            HELPER_R=thin.block_r,
            HELPER_STAGES=thin.num_stages,
            HAS_BIAS=bias is not None,
            PRECISION=precision(x),
            INTERPRETED=INTERPRETED,
            **tile_arguments(x, weight, y, r, False, c),
        )
    return y, s
