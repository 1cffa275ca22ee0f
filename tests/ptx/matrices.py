"""Matrices of every element type as bits, and their values: what tests of matrix instructions share."""

import math

import numpy as np

_SMALL = {"e4m3": (4, 3), "e5m2": (5, 2), "e3m2": (3, 2), "e2m3": (2, 3), "e2m1": (2, 1)}
_INTEGERS = {"s8": (8, True), "u8": (8, False), "s4": (4, True), "u4": (4, False)}
BITS = {"f16": 16, "bf16": 16, "tf32": 32, "f32": 32, "s32": 32, "f64": 64, "s4": 4, "u4": 4}
BITS |= dict.fromkeys(("s8", "u8", *_SMALL), 8)
SUMS = {"f16": np.float16, "f32": np.float32, "s32": np.int32, "f64": np.float64}
"""What an accumulator's elements are in NumPy."""

LANES = 32

# PTX ISA, "Matrix Fragments for mma.…": element i of a lane of group g, its place t in it. By M, K,
# bits: # (elements of A, row, column), (elements of B, row). The column of B is g.
FIGURES = {
    (16, 16, 16): (
        (
            8,
            lambda g, t, i: g if i < 2 or 4 <= i < 6 else g + 8,
            lambda g, t, i: t * 2 + (i & 1) + 8 * (i >= 4),
        ),
        (4, lambda t, i: t * 2 + (i & 1) + 8 * (i >= 2)),
    ),
    (16, 8, 16): (
        (4, lambda g, t, i: g if i < 2 else g + 8, lambda g, t, i: t * 2 + (i & 1)),
        (2, lambda t, i: t * 2 + i),
    ),
    (16, 4, 32): (
        (2, lambda g, t, i: g if i == 0 else g + 8, lambda g, t, i: t),
        (1, lambda t, i: t),
    ),
    (16, 8, 32): (
        (4, lambda g, t, i: g if i in (0, 2) else g + 8, lambda g, t, i: t if i < 2 else t + 4),
        (2, lambda t, i: t if i == 0 else t + 4),
    ),
    (8, 4, 64): ((1, lambda g, t, i: g, lambda g, t, i: t), (1, lambda t, i: t)),
    (16, 4, 64): (
        (2, lambda g, t, i: g if i == 0 else g + 8, lambda g, t, i: t),
        (1, lambda t, i: t),
    ),
    (16, 8, 64): (
        (4, lambda g, t, i: g if i in (0, 2) else g + 8, lambda g, t, i: t if i < 2 else t + 4),
        (2, lambda t, i: t + 4 * i),
    ),
    (16, 16, 64): (
        (
            8,
            lambda g, t, i: g if i % 2 == 0 else g + 8,
            lambda g, t, i: i * 2 + t if i % 2 == 0 else i * 2 - 2 + t,
        ),
        (4, lambda t, i: i * 4 + t),
    ),
    (8, 16, 8): ((4, lambda g, t, i: g, lambda g, t, i: t * 4 + i), (4, lambda t, i: t * 4 + i)),
    (16, 16, 8): (
        (8, lambda g, t, i: g if i < 4 else g + 8, lambda g, t, i: t * 4 + (i & 3)),
        (4, lambda t, i: t * 4 + i),
    ),
    (16, 32, 8): (
        (
            16,
            lambda g, t, i: g if i < 4 or 8 <= i < 12 else g + 8,
            lambda g, t, i: t * 4 + (i & 3) + (0 if i < 8 else 16),
        ),
        (8, lambda t, i: t * 4 + (i & 3) + (0 if i < 4 else 16)),
    ),
    (8, 32, 4): ((8, lambda g, t, i: g, lambda g, t, i: t * 8 + i), (8, lambda t, i: t * 8 + i)),
    (16, 32, 4): (
        (16, lambda g, t, i: g if i < 8 else g + 8, lambda g, t, i: t * 8 + (i & 7)),
        (8, lambda t, i: t * 8 + i),
    ),
    (16, 64, 4): (
        (
            32,
            lambda g, t, i: g if i < 8 or 16 <= i < 24 else g + 8,
            lambda g, t, i: t * 8 + (i & 7) + (0 if i < 16 else 32),
        ),
        (16, lambda t, i: t * 8 + (i & 7) + (0 if i < 8 else 32)),
    ),
}  # fmt: skip


def value(kind: str, bits: int) -> float:
    """Of the bits of an element, by the format's definition."""
    if kind in _INTEGERS:
        width, signed = _INTEGERS[kind]
        bits &= (1 << width) - 1
        return float(bits - (1 << width) if signed and bits >> (width - 1) else bits)
    exponent, mantissa = _SMALL[kind]
    if kind == "e2m1":  # in the middle of its byte
        bits >>= 2
    sign = -1.0 if bits >> (exponent + mantissa) & 1 else 1.0
    power = bits >> mantissa & ((1 << exponent) - 1)
    fraction = bits & ((1 << mantissa) - 1)
    bias = (1 << (exponent - 1)) - 1
    if kind == "e4m3" and power == 15 and fraction == 7:
        return math.nan
    if kind == "e5m2" and power == 31:
        return math.nan if fraction else sign * math.inf
    if power == 0:
        return sign * fraction * 2.0 ** (1 - bias - mantissa)
    return sign * (1 + fraction / (1 << mantissa)) * 2.0 ** (power - bias)


def values(kind: str, bits: np.ndarray) -> np.ndarray:
    """The same of an array, as float64."""
    if kind == "f64":
        return bits.view(np.float64)
    if kind == "f16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float64)
    if kind in ("bf16", "tf32", "f32"):
        shift = 16 if kind == "bf16" else 0
        return (bits.astype(np.uint32) << shift).view(np.float32).astype(np.float64)
    table = np.array([value(kind, code) for code in range(256)])
    return table[bits.astype(np.uint8)]


def random_bits(kind: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Bits of finite elements: of floats near 1, of small formats any."""
    if kind == "f64":
        return random.standard_normal(shape).view(np.uint64)
    if kind == "f16":
        return random.standard_normal(shape).astype(np.float16).view(np.uint16)
    if kind in ("bf16", "tf32"):
        bits = random.standard_normal(shape).astype(np.float32).view(np.uint32)
        return (bits >> 16).astype(np.uint16) if kind == "bf16" else bits & np.uint32(0xFFFFE000)
    bits = random.integers(0, 256, shape).astype(np.uint8)
    if BITS[kind] == 4:
        return bits & np.uint8(15)
    if kind == "e2m1":
        return bits & np.uint8(0x3C)
    if kind in ("e3m2", "e2m3"):
        return bits & np.uint8(0x3F)
    return np.where(np.isfinite(values(kind, bits)), bits, np.uint8(0x3A))


def words(kind: str, elements: np.ndarray) -> np.ndarray:
    """[..., n] elements as [..., registers]: the first in the lowest bits."""
    if kind == "f64":
        return elements
    width = BITS[kind]
    each = 32 // width
    grouped = elements.astype(np.uint64).reshape(*elements.shape[:-1], -1, each)
    shifts = np.arange(each, dtype=np.uint64) * np.uint64(width)
    return (grouped << shifts).sum(-1).astype(np.uint32)


def fragment_a(kind: str, a: np.ndarray) -> np.ndarray:
    """Registers [32, .] of A [8 or 16, K], given as bits."""
    (count, row, column), _ = FIGURES[(*a.shape, BITS[kind])]
    places = [
        [(row(n >> 2, n % 4, i), column(n >> 2, n % 4, i)) for i in range(count)]
        for n in range(LANES)
    ]
    return words(kind, np.array([[a[place] for place in lane] for lane in places]))


def fragment_b(kind: str, b: np.ndarray, m: int) -> np.ndarray:
    """Registers [32, .] of B [K, 8]."""
    _, (count, row) = FIGURES[m, len(b), BITS[kind]]
    return words(
        kind, np.array([[b[row(n % 4, i), n >> 2] for i in range(count)] for n in range(LANES)])
    )


def exact_sum(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """c [M, N] + a [M, K] · b [K, N], each sum rounded once to float64."""
    terms = np.concatenate([c[:, :, None], a[:, None, :] * b.T[None, :, :]], 2)
    return np.array([[math.fsum(row) for row in rows] for rows in terms])


def assert_rounded(found: np.ndarray, exact: np.ndarray, kind: str) -> None:
    """That sums are the exact ones, rounded to the accumulator."""
    if kind == "s32":
        np.testing.assert_array_equal(found.astype(np.int64), exact.astype(np.int64))
    else:
        with np.errstate(over="ignore"):
            expected = exact.astype(SUMS[kind])
        np.testing.assert_array_max_ulp(found.reshape(expected.shape), expected, 1)


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 256 bytes, as what cudaMalloc returns does."""
    memory = np.empty(array.nbytes + 256, np.uint8)
    start = -memory.ctypes.data % 256
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
