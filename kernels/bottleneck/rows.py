"""A product by few columns added to a matrix, row block by row block: how both kernels end."""

import triton
import triton.language as tl
from lorafast.kernels.common.device import cast, factor, low_rank_dot


@triton.jit
def add_product(
    z,
    factors,
    bias,
    base,
    out_ptr,
    rows,
    ranks,
    begin,
    end,
    M,
    N,
    b,
    scale,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``out = base + scale · (z·factors + bias)`` for ``rows``, the columns from begin to end.

    ``z [BLOCK_M, BLOCK_R]`` is a tile, ``factors [b, N]`` and ``base [M, N]`` are ``Matrix``, ``bias
    [N]`` is a ``Vector``; base, scale and bias may be None. ``out [M, N]`` is contiguous.
    """
    # 64 bits: M·N may pass 2**31 elements.
    row_offsets = rows.to(tl.int64)[:, None]  # [BLOCK_M, 1]
    factor_rows = factors.ptr + ranks.to(tl.int64)[:, None] * factors.stride_row  # [BLOCK_R, 1]
    for n in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        cols = n + tl.arange(0, BLOCK_N)
        offsets = cols.to(tl.int64)[None, :]
        tile = tl.load(
            factor_rows + offsets * factors.stride_col,
            mask=(ranks < b)[:, None] & (cols < end)[None, :],
            other=0.0,
        )  # [BLOCK_R, BLOCK_N]
        tile = factor(tile, out_ptr.dtype.element_ty, INTERPRETED)
        acc = tl.zeros((rows.shape[0], BLOCK_N), dtype=tl.float32)
        # Apart, or the compiler begins wgmma's sum with the bias or the base, and copies registers of
        # it behind the fence.
        acc = low_rank_dot(z, tile, acc, PRECISION, INTERPRETED, APART=True)
        if bias is not None:
            shift = tl.load(bias.ptr + cols.to(tl.int64) * bias.stride, mask=cols < end, other=0.0)
            acc += shift.to(tl.float32)[None, :]
        if scale is not None:
            acc *= scale
        inside = (rows < M)[:, None] & (cols < end)[None, :]  # [BLOCK_M, BLOCK_N]
        if base is not None:
            places = base.ptr + row_offsets * base.stride_row + offsets * base.stride_col
            acc += tl.load(places, mask=inside, other=0.0).to(tl.float32)
        out = cast(acc, out_ptr.dtype.element_ty, INTERPRETED)
        tl.store(out_ptr + row_offsets * N + offsets, out, mask=inside)
