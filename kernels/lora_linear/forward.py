"""``y = x·Wᵀ + scaling · (drop(x)·Aᵀ)·Bᵀ + bias`` and ``s = drop(x)·Aᵀ``.

Where helper CTAs pay it is one launch: they shrink row blocks while the others multiply. Elsewhere it is
``shrink``, then ``linear_expand``.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from lorafast.kernels.common.bundles import Matrix, Vector
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.counters import counters
from lorafast.kernels.common.device import cast, raise_flag, wait_for
from lorafast.kernels.common.launch import (
    INTERPRETED,
    KEPT,
    on_its_device,
    precision,
    rule_for,
    sms,
)
from lorafast.kernels.common.plan import LoraLinearLaunch, lora_linear_launch, tma_fits
from lorafast.kernels.common.start import Start, key_of
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
from lorafast.kernels.shrink import shrink
from lorafast.kernels.shrink.kernel import shrink_rows
from torch import Tensor

from lorafast.core.problem import Layout


@triton.jit(do_not_specialize=["M", "waves"])
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
    N_MAJOR: tl.constexpr,
    FLATTEN: tl.constexpr,
    HELPERS: tl.constexpr,
    HELPER_K: tl.constexpr,
    HELPER_R: tl.constexpr,
    HELPER_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """An item of the helpers is a row block of s; its flag says that it is there.

    The tiles read x and W by ``x`` and ``w``, descriptors or pointers, the helpers x by ``x_ptr``.
    """
    a = Matrix(a_ptr, stride_ar, stride_ak)
    b = Matrix(b_ptr, stride_bn, stride_br)
    bias = Vector(bias_ptr, stride_bias) if bias_ptr is not None else None
    if not DESCRIPTORS:
        x = Matrix(x, stride_xm, stride_xk)
        w = Matrix(w, stride_wn, stride_wk)
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
                Matrix(x_ptr, stride_xm, stride_xk), a, None, rows, ranks, 0, K, M, K, r,
                HELPER_K, HELPER_STAGES, PRECISION, INTERPRETED,
                # Both in shared memory as they are: in flight, ptxas would serialize every wgmma.
                APART=a_ptr.dtype.element_ty == x_ptr.dtype.element_ty,
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
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        acc = multiply(
            acc, x, w, row_block, col_block, 0, k_blocks, M, N, K,
            BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS, N_MAJOR, PRECISION, INTERPRETED,
        )  # fmt: skip
        s_ready = Matrix(s_ptr + wait_for(counters_ptr + FLAGS + row_block, INTERPRETED), r, 1)
        rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = add_low_rank(
            acc, s_ready, b, rows, cols, M, N, r, scaling,
            BLOCK_R, RANK_BLOCKS, PRECISION, INTERPRETED,
        )  # fmt: skip
        finish(acc, y, bias, row_block, col_block * BLOCK_N, M, N, PARTS, DESCRIPTORS, INTERPRETED)
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
    (M, K), (N, r) = x.shape, lora_B.shape
    read = Layout.of(weight)
    tma = tma_fits(x.dtype, Layout.of(x), read, M, K, N)
    launch = lora_linear_launch(
        config or rule_for("lora_linear", x, M, K, N, r, tma), rule_for("shrink", x, M, K, K, r),
        M, K, N, r,
        sms=sms(x), dtype=x.dtype, precision=precision(x), tma=tma, by_rows=read.rows > 0,
        bias=bias is not None, dropout=dropout_p > 0.0,
    )  # fmt: skip
    if launch is None:
        s = shrink(x, lora_A, dropout_p, seed)
        return linear_expand(x, weight, s, lora_B, scaling, bias, config=config), s
    return launcher(launch)(x, weight, lora_A, lora_B, scaling, bias)


@functools.lru_cache(maxsize=KEPT)
def launcher(launch: LoraLinearLaunch) -> Callable[..., tuple[Tensor, Tensor]]:
    """What launches it: of ``x, weight, lora_A, lora_B, scaling, bias``, and a dropout that is none."""
    gemm, helpers, c = launch.gemm, launch.helpers, launch.shrink
    M, N, K, r = gemm.M, gemm.N, gemm.K, gemm.r
    start = Start(lora_linear_kernel, (helpers.programs,), gemm.config.options)
    operands = operands_of(gemm)
    used = FLAGS.value + -(-M // gemm.config.block_m)
    blocks = (
        *blocks_of(gemm), helpers.helpers, c.block_k, c.block_r, c.num_stages, gemm.precision,
        INTERPRETED,
    )  # fmt: skip

    @on_its_device
    def run(
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        bias: Tensor | None = None,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        y = torch.empty((M, N), dtype=x.dtype, device=x.device)
        s = torch.empty((M, r), dtype=x.dtype, device=x.device)
        strides = (
            *x.stride(), *weight.stride(), *lora_A.stride(), *lora_B.stride(),
            None if bias is None else bias.stride(0),
        )  # fmt: skip
        start(
            key_of(strides, tensors=(x, weight, lora_A, lora_B, bias)),
            *operands(x, weight, y), x, lora_A, s, lora_B, bias, counters(x, used),
            M, N, K, r, helpers.waves, float(scaling), *strides, *blocks,
        )  # fmt: skip
        return y, s

    return run
