"""``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias`` in one accumulator.

The low-rank product is the last K-step of the base product, so that nothing waits for ``s``; under a
dropout mask, which falls on it alone, it is the first and initialises the accumulator instead.
"""

import torch
import triton
import triton.language as tl
from lorafast.kernels.common.configs import LaunchConfig, config_for
from lorafast.kernels.common.device import cast, dot, keep_mask
from lorafast.kernels.common.launch import INTERPRETED, dropout_arguments, on_device, precision
from torch import Tensor

# Neighbouring programs share this many row blocks, so that a tile of W is found in the L2 cache.
_GROUP_M = 8


@triton.jit
def _add_low_rank(
    acc,
    s_ptr,
    b_ptr,
    rows,
    cols,
    M,
    N,
    r,
    scale,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``acc + s·(scale · B)ᵀ`` for the tile at ``rows`` and ``cols``."""
    s_rows = s_ptr + rows.to(tl.int64)[:, None] * stride_sm
    b_cols = b_ptr + cols.to(tl.int64)[None, :] * stride_bn
    for first in range(0, r, BLOCK_R):
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
        acc = dot(s, b, acc, PRECISION, INTERPRETED)
    return acc


@triton.jit(do_not_specialize=["M", "r", "threshold"])
def linear_expand_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    b_ptr,
    bias_ptr,
    y_ptr,
    seed_ptr,
    M,
    N,
    K,
    r,
    threshold,
    scaling,
    survivor_scale,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    stride_bias,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program p computes one tile [BLOCK_M, BLOCK_N] of y, tiles in groups of GROUP_M row blocks."""
    program = tl.program_id(0)
    row_blocks = tl.cdiv(M, BLOCK_M)
    group_size = GROUP_M * tl.cdiv(N, BLOCK_N)
    group_first = program // group_size * GROUP_M
    group_rows = tl.minimum(row_blocks - group_first, GROUP_M)
    rows = (group_first + program % group_size % group_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = program % group_size // group_rows * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if HAS_DROPOUT:
        acc = _add_low_rank(
            acc, s_ptr, b_ptr, rows, cols, M, N, r, 1.0,
            stride_sm, stride_sr, stride_bn, stride_br, BLOCK_R, PRECISION, INTERPRETED,
        )  # fmt: skip
        keep = keep_mask(tl.load(seed_ptr), rows, first_col, N, threshold, BLOCK_N)
        acc = tl.where(keep, acc * (scaling * survivor_scale), 0.0)

    # 64 bits: M·K and N·K may pass 2**31 elements.
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_xm  # [BLOCK_M, 1]
    w_rows = w_ptr + cols.to(tl.int64)[None, :] * stride_wn  # [1, BLOCK_N]
    for k in range(0, K, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        offsets = depth.to(tl.int64)
        x = tl.load(
            x_rows + offsets[None, :] * stride_xk,
            mask=(rows < M)[:, None] & (depth < K)[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
        w = tl.load(
            w_rows + offsets[:, None] * stride_wk,
            mask=(cols < N)[None, :] & (depth < K)[:, None],
            other=0.0,
        )  # [BLOCK_K, BLOCK_N]
        acc = dot(x, w, acc, PRECISION, INTERPRETED)

    if not HAS_DROPOUT:
        acc = _add_low_rank(
            acc, s_ptr, b_ptr, rows, cols, M, N, r, scaling,
            stride_sm, stride_sr, stride_bn, stride_br, BLOCK_R, PRECISION, INTERPRETED,
        )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(
            bias_ptr + cols.to(tl.int64) * stride_bias, mask=cols < N, other=0.0
        )  # [BLOCK_N]
        acc += bias.to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :]  # [BLOCK_M, BLOCK_N]
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(y_ptrs, cast(acc, y_ptr.dtype.element_ty, INTERPRETED), mask=inside)


def linear_expand(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    config: LaunchConfig | None = None,
) -> Tensor:
    """``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias``.

    Shapes: ``x [M, K]``, ``weight [N, K]``, ``s [M, r]``, ``lora_B [N, r]``, ``bias [N]`` →
    ``y [M, N]``, in the dtype of ``x``.
    """
    M, K = x.shape
    N, r = lora_B.shape
    y = torch.empty((M, N), device=x.device, dtype=x.dtype)
    if y.numel() == 0:
        return y
    c = config or config_for("linear_expand", r, x.element_size())
    with on_device(x):
        linear_expand_kernel[(triton.cdiv(M, c.block_m) * triton.cdiv(N, c.block_n),)](
            x,
            weight,
            s,
            lora_B,
            x if bias is None else bias,
            y,
            M=M,
            N=N,
            K=K,
            r=r,
            scaling=float(scaling),
            stride_xm=x.stride(0),
            stride_xk=x.stride(1),
            stride_wn=weight.stride(0),
            stride_wk=weight.stride(1),
            stride_sm=s.stride(0),
            stride_sr=s.stride(1),
            stride_bn=lora_B.stride(0),
            stride_br=lora_B.stride(1),
            stride_bias=1 if bias is None else bias.stride(0),
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            BLOCK_K=c.block_k,
            BLOCK_R=c.block_r,
            GROUP_M=_GROUP_M,
            HAS_BIAS=bias is not None,
            PRECISION=precision(x),
            INTERPRETED=INTERPRETED,
            **c.options,
            **dropout_arguments(x, dropout_p, seed),
        )
    return y
