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
def four_bit_numbers(numbers_ptr, codes, LOW_FIRST: tl.constexpr, INTERPRETED: tl.constexpr):
    """The numbers of two codes a byte: uint8 ``[rows, bytes]`` → float32 ``[rows, 2 · bytes]``.

    Each lane has number ``lane % 16`` of the table, and a code is the lane that a shuffle asks: the bit
    above it may be anything, so a shift and a shuffle are all that a number takes. All lanes of a warp
    must come here together.
    """
    if INTERPRETED:
        found = tl.load(numbers_ptr + four_bit_codes(codes, LOW_FIRST))
    else:
        own = tl.inline_asm_elementwise(
            """{
            .reg .b32 lane;
            .reg .b64 at;
            mov.u32 lane, %laneid;
            and.b32 lane, lane, 15;
            mad.wide.u32 at, lane, 4, $1;
            ld.global.nc.f32 $0, [at];
            }""",
            "=f,l",
            [numbers_ptr],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 at<7>;
            shr.u32 at0, $8, 4;
            shr.u32 at1, $8, 8;
            shr.u32 at2, $8, 12;
            shr.u32 at3, $8, 16;
            shr.u32 at4, $8, 20;
            shr.u32 at5, $8, 24;
            shr.u32 at6, $8, 28;
            shfl.sync.idx.b32 $0, $9, $8, 31, 0xffffffff;
            shfl.sync.idx.b32 $4, $9, at0, 31, 0xffffffff;
            shfl.sync.idx.b32 $1, $9, at1, 31, 0xffffffff;
            shfl.sync.idx.b32 $5, $9, at2, 31, 0xffffffff;
            shfl.sync.idx.b32 $2, $9, at3, 31, 0xffffffff;
            shfl.sync.idx.b32 $6, $9, at4, 31, 0xffffffff;
            shfl.sync.idx.b32 $3, $9, at5, 31, 0xffffffff;
            shfl.sync.idx.b32 $7, $9, at6, 31, 0xffffffff;
            }""",
            "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,f,f,f,f",
            [codes, own],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
        found = tl.interleave(low, high) if LOW_FIRST else tl.interleave(high, low)
    return found


@triton.jit
def int8_to_float(codes, NEIGHBOURS: tl.constexpr, INTERPRETED: tl.constexpr):
    """int8 → float32: with 128 behind the exponent of 2^23 it is that much more.

    That takes a logical operation and a sum. A conversion has a quarter of their rate.

    NEIGHBOURS: a thread has codes as they lie in memory, four in a word, of which a permutation of bytes
    makes each float.
    """
    if NEIGHBOURS and not INTERPRETED:
        found = tl.inline_asm_elementwise(
            """{
            .reg .b32 more;
            xor.b32 more, $4, 0x80808080;
            prmt.b32 $0, more, 0x4B000000, 0x7540;
            prmt.b32 $1, more, 0x4B000000, 0x7541;
            prmt.b32 $2, more, 0x4B000000, 0x7542;
            prmt.b32 $3, more, 0x4B000000, 0x7543;
            }""",
            "=&r,=&r,=&r,=&r,r",
            [codes],
            dtype=tl.uint32,
            is_pure=True,
            pack=4,
        )
    else:
        found = (codes.to(tl.uint8, bitcast=True).to(tl.uint32) ^ 0x80) | 0x4B000000
    return found.to(tl.float32, bitcast=True) - 8388736.0
