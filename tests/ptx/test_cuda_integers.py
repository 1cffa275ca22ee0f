"""What nvcc makes of integers, against Python's."""

import pytest

from ptx.cuda_cases import archs, needs_nvcc
from ptx.cuda_rows import check, clamped, drawn_integers, rows_of, signed

pytestmark = needs_nvcc


def quotient(a, b):
    """As C divides: towards zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def remainder(a, b):
    return a - quotient(a, b) * b


def parts(value, bits, signs):
    """Fields of a word of 32 bits, the lowest first."""
    fields = [value >> i & (1 << bits) - 1 for i in range(0, 32, bits)]
    return [signed(f, bits) for f in fields] if signs else fields


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=False))


def permuted(u, v, selector):
    chosen = parts(u, 8, False) + parts(v, 8, False)
    return sum(chosen[selector >> 4 * i & 7] << 8 * i for i in range(4))


def leading(value, bits):
    return bits - (value % (1 << bits)).bit_length()


def reversed_bits(value, bits):
    return int(f"{value % (1 << bits):0{bits}b}"[::-1], 2)


def first_set(value):
    return (value & -value).bit_length()


def last_difference(a):
    """Of the highest bit that isn't the sign's; -1 if there is none."""
    return (a if a >= 0 else ~a).bit_length() - 1


def nth_set(value, base, n):
    places = [i for i in range(base, 32) if value >> i & 1]
    return places[n - 1] if len(places) >= n else -1


def words(definition, bits=32):
    """Of the signed numbers and of the same bits without a sign, that (a, b, u, v) names."""

    def of(a, b):
        a, b = int(a), int(b)
        return definition(a, b, a % (1 << bits), b % (1 << bits))

    return of


LEAST = -(1 << 31)
INTEGERS = {
    "add": lambda a, b, u, v: a + b,
    "subtract": lambda a, b, u, v: a - b,
    "multiply": lambda a, b, u, v: a * b,
    "multiply and add": lambda a, b, u, v: 37 * a + b,
    "a / b": lambda a, b, u, v: 0 if a == LEAST else quotient(a, b),
    "a % b": lambda a, b, u, v: 0 if a == LEAST else remainder(a, b),
    "u / v": lambda a, b, u, v: u // v,
    "u % v": lambda a, b, u, v: u % v,
    "u / 7": lambda a, b, u, v: u // 7,
    "a / 12": lambda a, b, u, v: quotient(a, 12),
    "mulhi": lambda a, b, u, v: a * b >> 32,
    "umulhi": lambda a, b, u, v: u * v >> 32,
    "min": lambda a, b, u, v: min(a, b),
    "max": lambda a, b, u, v: max(a, b),
    "umin": lambda a, b, u, v: min(u, v),
    "umax": lambda a, b, u, v: max(u, v),
    "abs": lambda a, b, u, v: abs(quotient(a, 2)),
    "u <<": lambda a, b, u, v: u << v % 32,
    "a >>": lambda a, b, u, v: a >> v % 32,
    "u >>": lambda a, b, u, v: u >> v % 32,
    "select bits": lambda a, b, u, v: u & v | ~u & 0x0F0F0F0F,
    "xor not": lambda a, b, u, v: a ^ ~b,
    "popc": lambda a, b, u, v: u.bit_count(),
    "clz": lambda a, b, u, v: leading(u, 32),
    "ffs": lambda a, b, u, v: first_set(u),
    "brev": lambda a, b, u, v: reversed_bits(u, 32),
    "byte_perm": lambda a, b, u, v: permuted(u, v, 0x3617),
    "byte_perm by u": lambda a, b, u, v: permuted(u, v, u),
    "funnel left": lambda a, b, u, v: (v << 32 | u) << 9 >> 32,
    "funnel right": lambda a, b, u, v: (v << 32 | u) >> u % 32,
    "funnel left clamped": lambda a, b, u, v: (v << 32 | u) << min(u % 64, 32) >> 32,
    "funnel right clamped": lambda a, b, u, v: (v << 32 | u) >> min(u % 64, 32),
    "dp4a": lambda a, b, u, v: dot(parts(a, 8, True), parts(b, 8, True)) + 1000,
    "dp4a unsigned": lambda a, b, u, v: dot(parts(u, 8, False), parts(v, 8, False)) + 1000,
    "dp2a low": lambda a, b, u, v: dot(parts(a, 16, True), parts(b, 8, True)[:2]) - 7,
    "dp2a high": lambda a, b, u, v: dot(parts(u, 16, False), parts(v, 8, False)[2:]) + 7,
    "sad": lambda a, b, u, v: abs(a - b) + 3,
    "usad": lambda a, b, u, v: abs(u - v) + 3,
    "hadd": lambda a, b, u, v: a + b >> 1,
    "urhadd": lambda a, b, u, v: u + v + 1 >> 1,
    "choice": lambda a, b, u, v: a - 3 if a > b else b * 5,
    "bytes": lambda a, b, u, v: signed(a, 8) * (b % 256),
    "halves": lambda a, b, u, v: signed(a, 16) + b % 65536,
}
INTEGERS_PTX = {
    "bfe.s32": lambda a, b, u, v: signed(a >> 5 & 511, 9),
    "bfe.u32": lambda a, b, u, v: u >> v % 32 & 4095,
    "bfi": lambda a, b, u, v: v & ~(2047 << 8) | (u & 2047) << 8,
    "bfind.u32": lambda a, b, u, v: u.bit_length() - 1,
    "bfind.shiftamt.s32": lambda a, b, u, v: (
        31 - last_difference(a) if last_difference(a) >= 0 else -1
    ),
    "add.sat": lambda a, b, u, v: clamped(a + b),
    "sub.sat": lambda a, b, u, v: clamped(a - b),
    "mad.lo": lambda a, b, u, v: a * b + b,
    "mad.hi": lambda a, b, u, v: (u * v >> 32) + u,
    "mul24": lambda a, b, u, v: signed(a, 24) * signed(b, 24),
    "lop3": lambda a, b, u, v: u & v | u & 0x12345678 | v & 0x12345678,
    "szext": lambda a, b, u, v: signed(a, 13),
    "slct": lambda a, b, u, v: a if a >= 0 else b,
    "cnot": lambda a, b, u, v: int(a % 2 == 0),
    "fns": lambda a, b, u, v: nth_set(u, 3, 2),
    "setp.and p|q": lambda a, b, u, v: 7 if a == 0 else a + 1 if a < b else b + 2,
    "set": lambda a, b, u, v: -1 if a > b else 0,
    "carry": lambda a, b, u, v: (v << 32 | u) * 3 >> 32,
    "borrow": lambda a, b, u, v: (v << 32 | u) - (u << 32 | v) >> 32,
}
WIDE_LEAST = -(1 << 63)
INTEGERS_WIDE = {
    "add": lambda a, b, u, v: a + b,
    "subtract": lambda a, b, u, v: a - b,
    "multiply": lambda a, b, u, v: a * b,
    "a / b": lambda a, b, u, v: 0 if a == WIDE_LEAST else quotient(a, b),
    "a % b": lambda a, b, u, v: 0 if a == WIDE_LEAST else remainder(a, b),
    "u / v": lambda a, b, u, v: u // v,
    "u % v": lambda a, b, u, v: u % v,
    "u / 1000003": lambda a, b, u, v: u // 1000003,
    "mul64hi": lambda a, b, u, v: a * b >> 64,
    "umul64hi": lambda a, b, u, v: u * v >> 64,
    "min": lambda a, b, u, v: min(a, b),
    "umax": lambda a, b, u, v: max(u, v),
    "u <<": lambda a, b, u, v: u << v % 64,
    "a >>": lambda a, b, u, v: a >> v % 64,
    "u >>": lambda a, b, u, v: u >> v % 64,
    "and not": lambda a, b, u, v: a & ~b,
    "or": lambda a, b, u, v: a | b,
    "xor": lambda a, b, u, v: a ^ b,
    "popc": lambda a, b, u, v: u.bit_count(),
    "clz": lambda a, b, u, v: leading(u, 64),
    "ffs": lambda a, b, u, v: first_set(u),
    "brev": lambda a, b, u, v: reversed_bits(u, 64),
    "abs": lambda a, b, u, v: abs(quotient(a, 2)),
    "to int": lambda a, b, u, v: signed(a),
    "wide": lambda a, b, u, v: signed(a) * signed(b),
    "wide and add": lambda a, b, u, v: u % (1 << 32) * (v % (1 << 32)) + u,
    "to short": lambda a, b, u, v: signed(a, 16),
    "to byte": lambda a, b, u, v: u % 256,
    "128 bits": lambda a, b, u, v: u * u + v >> 64,
    "128 bits / 3": lambda a, b, u, v: (u * u + v) // 3 >> 40,
}


@archs(75, 80, 90)
@pytest.mark.parametrize(
    ("kernel", "definitions", "bits"),
    [
        ("integers", INTEGERS, 32),
        ("integers_ptx", INTEGERS_PTX, 32),
        ("integers_wide", INTEGERS_WIDE, 64),
    ],
)
def test_integers(kernel, definitions, bits, arch):
    inputs = drawn_integers(bits, 0), drawn_integers(bits, 1, zero=False)
    named = [(name, words(definition, bits)) for name, definition in definitions.items()]
    rows = rows_of("integers", kernel, arch, inputs, named, (len(named), f"int{bits}"))
    check(named, rows, inputs, lambda found, expected: int(found) == signed(expected, bits))
