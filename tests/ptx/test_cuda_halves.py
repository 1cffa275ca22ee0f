"""What nvcc makes of half precision, bf16 and fp8, against fractions."""

import math
from fractions import Fraction

import numpy as np

from ptx.cuda_cases import archs, launch, needs_nvcc
from ptx.cuda_rows import (
    INF,
    NAN,
    THREADS,
    N,
    add,
    check,
    divide,
    drawn,
    exactly,
    fma,
    integer,
    multiply,
    relative,
    rows_of,
    saturated,
    subtract,
)
from ptx.exact import BF16, E4M3, E5M2, F16, decoded
from ptx.launch import Out

pytestmark = needs_nvcc


def pairs(definition):
    """Of (x, y), (y, z), (z, x), element by element: two rows."""
    return [
        lambda a, b, c: definition(a, b, c),
        lambda a, b, c: definition(b, c, a),
    ]


def nan_if_any(choose):
    return lambda a, b: NAN if a != a or b != b else float(choose(a, b))


def relu(value):
    return value if value != value else max(value, 0.0)


def half_definitions(format, arch):
    """Names and definitions of the rows of ``halves`` and ``bfloats``; half precision also of sm_75."""
    rounded_fma = exactly(fma, format)
    pair = [
        ("hadd2", exactly(add, format)),
        ("hmul2", exactly(multiply, format)),
        ("hfma2", rounded_fma),
    ]
    first = [
        ("hadd", exactly(add, format)),
        ("hsub", exactly(subtract, format)),
        ("hmul", exactly(multiply, format)),
        ("hfma", rounded_fma),
        ("hadd_sat", lambda a, b, c: saturated(exactly(add, format)(a, b))),
    ]
    newer = [
        ("hmin", lambda a, b, c: float(np.fmin(a, b))),
        ("hmax_nan", lambda a, b, c: nan_if_any(max)(a, b)),
        ("hfma_relu", lambda a, b, c: relu(rounded_fma(a, b, c))),
    ]
    newer_pairs = [
        ("hmax2", lambda a, b, c: float(np.fmax(a, b))),
        ("hmin2_nan", lambda a, b, c: nan_if_any(min)(a, b)),
    ]
    unary = [
        ("hneg", lambda a, b, c: -a),
        ("habs", lambda a, b, c: abs(a)),
        ("hdiv", exactly(divide, format)),
        ("hsqrt", lambda a, b, c: exactly(lambda x: x, format)(np.sqrt(np.float64(abs(a))))),
    ]
    if format is F16:
        rows = [
            *first,
            ("hfma_sat", lambda a, b, c: saturated(rounded_fma(a, b, c))),
            *unary,
            ("hfloor", lambda a, b, c: float(np.floor(a))),
            ("hrint", lambda a, b, c: float(np.rint(a))),
            ("hlt", lambda a, b, c: a if a < b else c),
            ("hisnan", lambda a, b, c: b if a != a else c),
        ]
        pair += [
            ("hfma2_sat", lambda a, b, c: saturated(rounded_fma(a, b, c))),
            ("hneg2", lambda a, b, c: -a),
            ("hlt2", lambda a, b, c: int(a < b)),
            ("hgtu2", lambda a, b, c: int(not a <= b)),
        ]
        rows += [(name, each) for name, definition in pair for each in pairs(definition)]
        if arch >= 80:
            rows += newer
            newer_pairs.append(("hfma2_relu", lambda a, b, c: relu(rounded_fma(a, b, c))))
            rows += [(name, each) for name, of in newer_pairs for each in pairs(of)]
        return rows
    pair += [*newer_pairs, ("hne2", lambda a, b, c: int(a != b and a == a and b == b))]
    return [
        *first,
        *unary,
        ("hceil", lambda a, b, c: float(np.ceil(a))),
        ("hge", lambda a, b, c: a if a >= b else c),
        *newer,
        *((name, each) for name, definition in pair for each in pairs(definition)),
    ]


def as_bfloats(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


@archs(75, 80, 90)
def test_halves(arch):
    inputs = [drawn(np.float16, seed) for seed in range(10, 13)]
    definitions = half_definitions(F16, arch)
    rows = rows_of("halves", "halves", arch, inputs, definitions, (len(definitions), np.float16))
    check(definitions, rows, inputs)


@archs(80, 90)
def test_bfloats(arch):
    bits = [
        (drawn(np.float32, seed).view(np.uint32) >> 16).astype(np.uint16) for seed in (13, 14, 15)
    ]
    definitions = half_definitions(BF16, arch)
    rows = rows_of("halves", "bfloats", arch, bits, definitions, (len(definitions), np.uint16))
    check(definitions, [as_bfloats(row) for row in rows], [as_bfloats(b) for b in bits])


def code(format, bits, to="nearest"):
    """A float's bits in a format, as an integer; NaN for NaN."""
    mantissa_bits = format.precision - 1

    def of(value):
        if value != value:
            return NAN
        rounded = exactly(lambda x: x, format, to)(value)
        size = int(np.signbit(value)) << bits - 1
        if np.isinf(rounded):
            return size | ((1 << bits - 1 - mantissa_bits) - 1) << mantissa_bits
        exact = abs(Fraction(rounded))
        exponent = (
            max(math.frexp(rounded)[1] - 1, format.smallest_exponent)
            if rounded
            else (format.smallest_exponent)
        )
        mantissa = int(exact / Fraction(2) ** (exponent - mantissa_bits))
        return size | mantissa + (exponent - format.smallest_exponent << mantissa_bits)

    return of


def saturating(format, bits):
    """The same of an fp8 format, at whose ends numbers stay."""

    def of(value):
        if value == value:
            value = np.copysign(np.float64(min(abs(value), float(format.largest))), value)
        return code(format, bits)(value)

    return of


def fp8_pair(format):
    """The codes of a in the low byte, of b in the high one; where one is NaN, NaN."""
    of = saturating(format, 8)
    return lambda a, b: of(a) + of(b) * 256


def codes(found, expected):
    """Equal; of a NaN the test asks elsewhere, and not for its bits."""
    return expected != expected or int(found) == expected % (1 << 16)


def half_of(value):
    return exactly(lambda x: x, F16)(value)


ROUNDINGS = {
    "half rn": lambda a, b: code(F16, 16)(a),
    "half rz": lambda a, b: code(F16, 16, "zero")(a),
    "half rm": lambda a, b: code(F16, 16, "down")(a),
    "half rp": lambda a, b: code(F16, 16, "up")(a),
    "half2 low": lambda a, b: code(F16, 16)(a),
    "half2 high": lambda a, b: code(F16, 16)(b),
    "double to half": lambda a, b: code(F16, 16)(np.float64(a) * 1.0000001),
    "bf16 rn": lambda a, b: code(BF16, 16)(a),
    "bf16 rz": lambda a, b: code(BF16, 16, "zero")(a),
    "bf16 rm": lambda a, b: code(BF16, 16, "down")(a),
    "bf16 rp": lambda a, b: code(BF16, 16, "up")(a),
    "bf162 low": lambda a, b: code(BF16, 16)(a),
    "bf162 high": lambda a, b: code(BF16, 16)(b),
    "int to half": lambda a, b: code(F16, 16)(np.float64(integer(math.trunc, 32, True)(a * 100))),
    "half to unsigned short": lambda a, b: integer(math.trunc, 16, False)(
        np.float64(half_of(abs(a)))
    ),
    "half to short": lambda a, b: integer(round, 16, True)(np.float64(half_of(b))),
    "e4m3": fp8_pair(E4M3),
    "e5m2": fp8_pair(E5M2),
}


@archs(75, 80, 90)
def test_roundings(arch):
    inputs = [drawn(np.float32, seed) for seed in (16, 17)]
    rng = np.random.default_rng(18)
    for x in inputs:  # what the narrow formats tell apart, their ends and their smallest numbers
        few = rng.choice(N, N // 3, replace=False)
        x[few] = rng.integers(-2048, 2049, N // 3) * 2.0 ** rng.integers(-30, 8, N // 3)
    rows = rows_of("halves", "roundings", arch, inputs, ROUNDINGS, (len(ROUNDINGS), np.uint16))
    check(ROUNDINGS.items(), rows, inputs, codes)
    # Of NaN: half has all bits but the sign, as bf16 has; so has e4m3 in either byte.
    nans = [np.isnan(x) for x in inputs]
    assert nans[0].any()
    named = dict(zip(ROUNDINGS, rows, strict=True))
    assert set(named["half rn"][nans[0]]) == set(named["bf16 rn"][nans[0]]) == {0x7FFF}
    assert set(named["e4m3"][nans[0]] & 0x7F) == set(named["e4m3"][nans[1]] >> 8 & 0x7F) == {0x7F}
    assert all(named["e5m2"][nans[0]] & 0x7F > 0x7C)


def e4m3(value):
    """The last exponent stands for numbers too, but for NaN in its last code."""
    if value & 0x7F == 0x7F:
        return NAN
    # With one bit of exponent more, which it doesn't use, the last one is as the others.
    sign, rest = value >> 7, value & 0x7F
    wide = decoded(sign << 8 | rest + (8 << 3 if rest >> 3 else 0), 5, 3)
    return float(wide) if rest >> 3 else float((-1) ** sign * Fraction(rest, 8) * Fraction(2) ** -6)


def e5m2(value):
    if (value >> 2 & 31) == 31:
        return NAN if value & 3 else (-INF if value >> 7 else INF)
    return float(decoded(value, 5, 2))


@archs(80, 90)
def test_from_fp8(arch):
    out = np.zeros((4, 256), np.float16)
    launch("halves", "from_fp8", arch, 4, THREADS, [Out("out", out), 256])
    for row, format, there in zip(out, (e4m3, e4m3, e5m2, e5m2), (1, -1, 1, -1), strict=True):
        expected = [format(value) for value in range(256)[::there]]
        np.testing.assert_array_equal(row, np.array(expected, np.float16))


HALVES_NEAR = {
    "hexp": np.exp,
    "hexp2": np.exp2,
    "hlog2": lambda a: np.log2(abs(a)),
    "hrsqrt": lambda a: 1 / np.sqrt(abs(a)),
    "hsin": np.sin,
    "htanh": np.tanh,
}


@archs(75, 90)
def test_halves_near(arch):
    x = np.random.default_rng(19).uniform(-4, 4, N).astype(np.float16)
    rows = rows_of("halves", "halves_near", arch, [x], HALVES_NEAR, (len(HALVES_NEAR), np.float16))
    check(HALVES_NEAR.items(), rows, [x.astype(np.float64)], relative(9, 2.0**-11))
