"""``y = l ⊙ (x·Wᵀ + b)`` or ``y = (l ⊙ x)·Wᵀ + b`` in one launch: the GEMM of ``linear_expand``.

The vector multiplies the accumulator before it is written, or each tile of x as it is loaded, rounded as
x is. z, which is y before it is scaled, is written from the same accumulator where a backward asks.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from lorafast.kernels.common.bundles import Matrix, Vector
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.counters import counters
from lorafast.kernels.common.device import arrive, sum_blocks
from lorafast.kernels.common.launch import (
    INTERPRETED,
    KEPT,
    on_its_device,
    precision,
    rule_for,
    sms,
)
from lorafast.kernels.common.plan import tma_fits
from lorafast.kernels.common.scaled_plan import ScaledGemmLaunch, scaled_gemm_launch
from lorafast.kernels.common.start import Start, key_of
from lorafast.kernels.common.tma import describer
from lorafast.kernels.linear_expand.tile import blocks_of, finish, multiply, operands_of, tile_at
from torch import Tensor

from lorafast.core.problem import Layout


@triton.jit(do_not_specialize=["M", "splits"])
def scaled_linear_kernel(
    x,
    w,
    y,
    z,
    scale_ptr,
    bias_ptr,
    kept_ptr,
    sums_ptr,
    partials_ptr,
    counters_ptr,
    M,
    N,
    K,
    splits,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_scale,
    stride_bias,
    stride_km,
    stride_kn,
    AT_LOAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    N_MAJOR: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program p takes items p, p + programs, …; an item is a tile, or one of ``splits`` shares of it.

    Of y, z, the bias and the sums with ``kept`` what isn't asked for is None, and the vector where
    nothing is scaled.
    """
    scale = Vector(scale_ptr, stride_scale) if scale_ptr is not None else None
    bias = Vector(bias_ptr, stride_bias) if bias_ptr is not None else None
    kept = Matrix(kept_ptr, stride_km, stride_kn) if kept_ptr is not None else None
    if not DESCRIPTORS:
        x = Matrix(x, stride_xm, stride_xk)
        w = Matrix(w, stride_wn, stride_wk)
    items = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N) * splits
    k_blocks = tl.cdiv(K, BLOCK_K)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), flatten=FLATTEN):
        if partials_ptr is not None:
            tile = item // splits
            share = item % splits
            begin = k_blocks * share // splits
            end = k_blocks * (share + 1) // splits
        else:
            tile = item
            begin = 0
            end = k_blocks
        row_block, col_block = tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        acc = multiply(
            acc, x, w, row_block, col_block, begin, end, M, N, K,
            BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS, N_MAJOR, PRECISION, INTERPRETED,
            scale if AT_LOAD else None,
        )  # fmt: skip
        last = True
        if partials_ptr is not None:
            rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
            cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
            offsets = rows.to(tl.int64)[:, None] * N + cols[None, :]  # [BLOCK_M, BLOCK_N]
            inside = (rows < M)[:, None] & (cols < N)[None, :]
            size = tl.cast(M, tl.int64) * N
            tl.store(partials_ptr + share * size + offsets, acc, mask=inside)
            last = arrive(counters_ptr + tile) == splits - 1
            if last:
                acc = sum_blocks(partials_ptr, offsets, inside, size, splits)
                tl.store(counters_ptr + tile, 0)
        if last:
            finish(
                acc, y, bias, row_block, col_block * BLOCK_N, M, N, PARTS, DESCRIPTORS, INTERPRETED,
                None if AT_LOAD else scale, z, kept, sums_ptr,
            )  # fmt: skip


def scaled_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    scales_input: bool = False,
    *,
    keeps: bool = False,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``y = l ⊙ (x·Wᵀ + b)``, with ``scales_input`` ``y = (l ⊙ x)·Wᵀ + b``; and z or None.

    Shapes: ``x [M, K]``, ``weight [N, K]``, ``bias [N]``, ``scale [N]``, with ``scales_input`` ``[K]``
    → ``y``, ``z [M, N]`` in the dtype of ``x``. ``keeps``: whether ``z = x·Wᵀ + b`` is asked for.
    """
    launch = gemm_launch(
        x, weight, config, bias=bias is not None, at_load=scales_input, keeps=keeps
    )
    y, z, _ = launcher(launch)(x, weight, scale, bias)
    assert y is not None
    return y, z


def gemm_launch(
    x: Tensor,
    weight: Tensor,
    config: LaunchConfig | None,
    *,
    transposed: bool = False,
    **asked: bool,
) -> ScaledGemmLaunch:
    """The launch of ``x·Wᵀ`` or, transposed, of ``x·W``, by the rule unless a ``config`` is given."""
    (M, K), N = x.shape, weight.shape[1 if transposed else 0]
    read = Layout.of(weight)
    tma = tma_fits(x.dtype, Layout.of(x), read, M, K, N)
    return scaled_gemm_launch(
        config or rule_for("linear_expand", x, M, K, N, 0, tma), M, K, N,
        sms=sms(x), dtype=x.dtype, precision=precision(x), tma=tma, transposed=transposed,
        by_rows=read.rows > 0, **asked,
    )  # fmt: skip


@functools.lru_cache(maxsize=KEPT)
def launcher(
    launch: ScaledGemmLaunch,
) -> Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """What launches it: of ``x, weight, scale, bias, kept``, which may be None where nothing takes them,
    gives y, z and the partial sums ``[row blocks, N]``, None for what isn't asked for."""
    gemm = launch.gemm
    M, N, K, splits = gemm.M, gemm.N, gemm.K, gemm.splits
    c = gemm.config
    start = Start(scaled_linear_kernel, (gemm.programs,), c.options)
    operands = operands_of(gemm)
    of_z = describer([c.block_m, c.block_n // gemm.parts]) if gemm.tma else None
    block_m, block_n, block_k, _, _, *rest = blocks_of(gemm)
    blocks = (launch.at_load, block_m, block_n, block_k, *rest, gemm.precision, INTERPRETED)

    @on_its_device
    def run(
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        y = torch.empty((M, N), dtype=x.dtype, device=x.device) if launch.writes else None
        scale = scale if launch.writes else None
        z = torch.empty((M, N), dtype=x.dtype, device=x.device) if launch.keeps else None
        sums = None
        if launch.sums:
            sums = torch.empty((launch.row_blocks, N), dtype=torch.float32, device=x.device)
        if not M * N:
            return y, z, sums
        partials = used = None
        if splits > 1:
            partials = torch.empty((splits, M, N), dtype=torch.float32, device=x.device)
            used = counters(x, gemm.tiles)
        of_w = weight.stride()
        strides = (
            *x.stride(), *(of_w[::-1] if gemm.transposed else of_w),
            None if scale is None else scale.stride(0), None if bias is None else bias.stride(0),
            *((None, None) if kept is None else kept.stride()),
        )  # fmt: skip
        start(
            key_of(strides, tensors=(x, weight, scale, bias, kept)),
            *operands(x, weight, y), z if of_z is None or z is None else of_z(z), scale, bias, kept,
            sums, partials, used, M, N, K, splits, *strides, *blocks,
        )  # fmt: skip
        return y, z, sums

    return run
