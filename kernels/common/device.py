"""Device functions used by more than one kernel."""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """``acc + a·b`` in float32; PRECISION applies to float32 operands."""
    if INTERPRETED:
        # The interpreter's dot takes the bits of bf16 for integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def cast(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """``x`` in ``dtype``, rounded to nearest even."""
    if x.dtype != dtype:
        x = x.to(tl.float32)
        if INTERPRETED and dtype == tl.bfloat16:
            # The interpreter cuts the low bits off: round them away first. NaN and infinity stay.
            bits = x.to(tl.uint32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = tl.where(tl.abs(x) < float("inf"), rounded.to(tl.float32, bitcast=True), x)
        x = x.to(dtype)
    return x


@triton.jit
def keep_mask(
    seed,
    rows,
    first_column,
    K,
    threshold,
    BLOCK: tl.constexpr,
):
    """The dropout mask of a tile ``[len(rows), BLOCK]`` whose columns start at ``first_column``.

    ``lorafast.reference.dropout`` defines it. ``first_column`` and BLOCK are multiples of 8, so that
    one Philox call serves eight neighbouring columns of the tile.
    """
    groups = first_column // 8 + tl.arange(0, BLOCK // 8)  # [BLOCK / 8]
    counter = rows.to(tl.int64)[:, None] * tl.cdiv(K, 8) + groups[None, :]
    w0, w1, w2, w3 = tl.randint4x(seed, counter, n_rounds=7)  # [BLOCK_M, BLOCK / 8] each
    # Half-word h of a call belongs to column h of its group: low halves to even columns, high halves
    # to odd ones. Each interleave fills one more binary digit of the column, the last one first.
    even = tl.interleave(
        tl.interleave(w0 & 0xFFFF, w2 & 0xFFFF), tl.interleave(w1 & 0xFFFF, w3 & 0xFFFF)
    )
    odd = tl.interleave(tl.interleave(w0 >> 16, w2 >> 16), tl.interleave(w1 >> 16, w3 >> 16))
    return tl.interleave(even, odd).to(tl.int32) >= threshold  # [BLOCK_M, BLOCK]
