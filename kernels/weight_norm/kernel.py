"""``‖W + scaling · B·A‖`` of each row: one pass over W, whose sum with B·A is made tile by tile.

The sum itself is squared, in float32: where the adapter cancels a row no digits are lost to a difference
of squares.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from lorafast.kernels.common.bundles import Matrix
from lorafast.kernels.common.device import dot
from lorafast.kernels.common.launch import INTERPRETED, KEPT, on_its_device, sms
from lorafast.kernels.common.plan import WeightNormLaunch, weight_norm_launch
from lorafast.kernels.common.start import Start, key_of
from torch import Tensor

from lorafast.core.dtypes import LEAST_NORM


@triton.jit
def _rows_of_b(b, rows, ranks, N, r, WIDE: tl.constexpr):
    """B's tile ``[BLOCK_N, BLOCK_R]``, in float32 if ``WIDE``."""
    tile = tl.load(
        b.ptr + rows.to(tl.int64)[:, None] * b.stride_row + ranks.to(tl.int64)[None, :] * b.stride_col,
        mask=(rows < N)[:, None] & (ranks < r)[None, :],
        other=0.0,
    )  # fmt: skip
    return tile.to(tl.float32) if WIDE else tile


@triton.jit
def _columns_of_a(a, ranks, columns, K, r, WIDE: tl.constexpr):
    """A's tile ``[BLOCK_R, BLOCK_K]``, in float32 if ``WIDE``."""
    tile = tl.load(
        a.ptr
        + ranks.to(tl.int64)[:, None] * a.stride_row
        + columns.to(tl.int64)[None, :] * a.stride_col,
        mask=(ranks < r)[:, None] & (columns < K)[None, :],
        other=0.0,
    )
    return tile.to(tl.float32) if WIDE else tile


@triton.jit(do_not_specialize=["N"])
def weight_norm_kernel(
    w_ptr,
    a_ptr,
    b_ptr,
    norm_ptr,
    scaling,
    N,
    K,
    r,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    LEAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
    SCALING_IS_TENSOR: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program i takes BLOCK_N rows, and all of their columns.

    ``scaling`` is a number, or where SCALING_IS_TENSOR the address of one. A and B of one 16-bit dtype
    are multiplied as they are, else in float32. Blocks of ranks have sums of their own, since tensor
    cores cut a sum off whenever they add to it.
    """
    w = Matrix(w_ptr, stride_wn, stride_wk)
    a = Matrix(a_ptr, stride_ar, stride_ak)
    b = Matrix(b_ptr, stride_bn, stride_br)
    WIDE: tl.constexpr = a_ptr.dtype.element_ty != b_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    # [BLOCK_N, 1], in the 64 bits that N·K may need.
    w_rows = w.ptr + rows.to(tl.int64)[:, None] * w.stride_row
    s = tl.load(scaling).to(tl.float32) if SCALING_IS_TENSOR else scaling
    if RANK_BLOCKS <= 2:
        b_tile = _rows_of_b(b, rows, ranks, N, r, WIDE)
    if RANK_BLOCKS == 2:
        b_behind = _rows_of_b(b, rows, BLOCK_R + ranks, N, r, WIDE)
    squares = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        columns = k + tl.arange(0, BLOCK_K)
        w_tile = tl.load(
            w_rows + columns.to(tl.int64)[None, :] * w.stride_col,
            mask=(rows < N)[:, None] & (columns < K)[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_K]
        update = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        if RANK_BLOCKS <= 2:
            a_tile = _columns_of_a(a, ranks, columns, K, r, WIDE)
            update = dot(b_tile, a_tile, update, "tf32x3", INTERPRETED)
            if RANK_BLOCKS == 2:
                a_tile = _columns_of_a(a, BLOCK_R + ranks, columns, K, r, WIDE)
                part = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
                update += dot(b_behind, a_tile, part, "tf32x3", INTERPRETED)
        else:
            for i in tl.range(RANK_BLOCKS, num_stages=1):
                of_block = i * BLOCK_R + ranks
                a_tile = _columns_of_a(a, of_block, columns, K, r, WIDE)
                b_tile = _rows_of_b(b, rows, of_block, N, r, WIDE)
                part = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
                update += dot(b_tile, a_tile, part, "tf32x3", INTERPRETED)
        changed = w_tile.to(tl.float32) + s * update
        # Beyond K an infinite B has made NaN of zeros.
        squares += tl.where((columns < K)[None, :], changed * changed, 0.0)
    norm = tl.sqrt_rn(tl.sum(squares, 1))
    # Not a maximum, which would hide NaN.
    norm = tl.where(norm < LEAST, LEAST, norm)
    tl.store(norm_ptr + rows, norm, mask=rows < N)


def weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
    """``‖W + scaling · B·A‖`` of each row, at least ``LEAST_NORM``.

    Shapes: ``weight [N, K]``, ``lora_A [r, K]``, ``lora_B [N, r]``, of any strides, each in float32,
    bfloat16 or float16 → ``[N]`` in float32. ``scaling``: a number, or a tensor of one on the same
    device, which the host doesn't wait for.
    """
    (N, K), r = weight.shape, lora_A.shape[0]
    return launcher(weight_norm_launch(N, K, r, sms=sms(weight)))(weight, lora_A, lora_B, scaling)


@functools.lru_cache(maxsize=KEPT)
def launcher(launch: WeightNormLaunch) -> Callable[..., Tensor]:
    """What launches it: of ``weight, lora_A, lora_B, scaling``."""
    c, N, K, r = launch.config, launch.N, launch.K, launch.r
    start = Start(weight_norm_kernel, (launch.programs,), c.options)
    blocks = (LEAST_NORM, c.block_n, c.block_k, c.block_r, launch.rank_blocks, c.num_stages)

    @on_its_device
    def run(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
        norm = torch.empty((N,), dtype=torch.float32, device=weight.device)
        if not N:
            return norm
        strides = (*weight.stride(), *lora_A.stride(), *lora_B.stride())
        given = scaling if isinstance(scaling, Tensor) else None
        start(
            key_of(strides, tensors=(weight, lora_A, lora_B, given)),
            weight, lora_A, lora_B, norm, float(scaling) if given is None else given,
            N, K, r, *strides, *blocks, given is not None, INTERPRETED,
        )  # fmt: skip
        return norm

    return run
