"""Device functions that read what a quantized weight is stored in: codes, numbers, scales."""

import triton
import triton.language as tl
from lorafast.kernels.common.device import cast


@triton.jit
def four_bit_codes(codes, LOW_FIRST: tl.constexpr):
    """Two codes a byte: uint8 ``[rows, bytes]`` → int32 ``[rows, 2 · bytes]``.

    The first of two is the upper half of its byte; with LOW_FIRST the lower one.
    """
    low = (codes & 15).to(tl.int32)
    high = (codes >> 4).to(tl.int32)
    return tl.interleave(low, high) if LOW_FIRST else tl.interleave(high, low)


@triton.jit
def e4m3_to_float(codes, HARDWARE: tl.constexpr):
    """uint8 as e4m3 → float32. HARDWARE: whether the chip converts, from sm_89 on."""
    if HARDWARE:
        found = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        bits = codes.to(tl.uint32)
        # Exponent and mantissa at their places in a float32, whose exponent has another bias: 2**120
        # makes up for that, of subnormal numbers too.
        magnitude = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
        signed = magnitude.to(tl.uint32, bitcast=True) | ((bits & 0x80) << 24)
        found = tl.where((bits & 0x7F) == 0x7F, 0x7FC00000, signed).to(tl.float32, bitcast=True)
    return found


@triton.jit
def power_of_two(exponents):
    """``2^(exponent − 127)`` of uint8 as float32; the least is not normal, 255 is NaN."""
    bits = exponents.to(tl.uint32)
    ends = ((bits == 0) | (bits == 255)).to(tl.uint32) << 22
    return ((bits << 23) | ends).to(tl.float32, bitcast=True)


@triton.jit
def block_scales(
    scales_ptr,
    map_ptr,
    of_blocks_ptr,
    offset_ptr,
    blocks,
    inside,
    NESTED_BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The float32 scales of ``blocks``, of any shape.

    They are stored as float32; as exponents, uint8; or nested, if there is a ``map_ptr``:
    ``map[scales[b]] · of_blocks[b // NESTED_BLOCK] + offset``, each step rounded.
    """
    stored = tl.load(scales_ptr + blocks, mask=inside, other=0)
    if map_ptr is not None:
        numbers = tl.load(map_ptr + stored.to(tl.int32))
        of_blocks = tl.load(of_blocks_ptr + blocks // NESTED_BLOCK, mask=inside, other=0.0)
        if INTERPRETED:
            products = numbers * of_blocks
        else:  # what names its rounding isn't fused with the sum
            products = tl.inline_asm_elementwise(
                "mul.rn.f32 $0, $1, $2;",
                "=f,f,f",
                [numbers, of_blocks],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
        found = products + tl.load(offset_ptr)
    elif scales_ptr.dtype.element_ty == tl.uint8:
        found = power_of_two(stored)
    else:
        found = stored
    return found


@triton.jit
def rounded(W, STORED: tl.constexpr, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 as it is stored, 'float16', 'bfloat16' or 'float32', and then in ``dtype``."""
    if STORED == "bfloat16":
        W = cast(W, tl.bfloat16, INTERPRETED)
    elif STORED == "float16":
        W = cast(W, tl.float16, INTERPRETED)
    return cast(W, dtype, INTERPRETED)


@triton.jit
def number_at(numbers_ptr, codes, INTERPRETED: tl.constexpr):
    """``numbers[codes]``, of a loop whose other loads are pipelined: these are not to be, they hit the
    cache, so the compiler doesn't see that they are loads."""
    if INTERPRETED:
        found = tl.load(numbers_ptr + codes)
    else:
        found = tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];",
            "=f,l",
            [numbers_ptr + codes],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return found
