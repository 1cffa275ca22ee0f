"""Floating-point numbers as bit patterns: corners and random ones, and rounding by its definition."""

import math
import random
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

THREADS = 1024
NEAREST, TO_ZERO, DOWN, UP = "rn", "rz", "rm", "rp"
MODES = (NEAREST, TO_ZERO, DOWN, UP)


@dataclass(frozen=True)
class Format:
    """Floating-point numbers of so many bits."""

    name: str
    exponent_bits: int
    mantissa_bits: int

    @cached_property
    def bits(self):
        return 1 + self.exponent_bits + self.mantissa_bits

    @cached_property
    def dtype(self):
        return np.dtype(f"u{-(-self.bits // 8)}")

    @cached_property
    def bias(self):
        return (1 << self.exponent_bits - 1) - 1

    @cached_property
    def sign(self):
        return 1 << self.bits - 1

    @cached_property
    def infinity(self):
        return (1 << self.exponent_bits) - 1 << self.mantissa_bits

    @cached_property
    def nan(self):
        """The canonical one; a double may be any."""
        return self.sign - 1

    def value(self, bits):
        """Of a pattern, as a double, which holds every number of these formats."""
        sign = -1.0 if bits & self.sign else 1.0
        exponent = (bits & self.infinity) >> self.mantissa_bits
        mantissa = bits & (1 << self.mantissa_bits) - 1
        if bits & self.infinity == self.infinity:
            return math.nan if mantissa else sign * math.inf
        if exponent:
            mantissa += 1 << self.mantissa_bits
        return sign * math.ldexp(mantissa, max(exponent, 1) - self.bias - self.mantissa_bits)

    def rounded(self, value, mode, zero=1.0):
        """The pattern of a fraction; ``zero`` has the sign that an exact zero gets."""
        if value == 0:
            return self.sign if math.copysign(1, zero) < 0 else 0
        negative, value = value < 0, abs(value)
        exponent = value.numerator.bit_length() - value.denominator.bit_length()
        if Fraction(2) ** exponent > value:
            exponent -= 1
        exponent = max(exponent, 1 - self.bias)  # subnormal numbers have the smallest one's spacing
        steps = value / Fraction(2) ** (exponent - self.mantissa_bits)
        below = math.floor(steps)
        if mode == NEAREST:
            below += steps - below > Fraction(1, 2) or (
                steps - below == Fraction(1, 2) and below % 2 == 1
            )
        elif (mode == DOWN and negative) or (mode == UP and not negative):
            below = math.ceil(steps)
        bits = (exponent + self.bias - 1 << self.mantissa_bits) + below
        if bits >= self.infinity:
            stays = mode == TO_ZERO or (mode == UP and negative) or (mode == DOWN and not negative)
            bits = self.infinity - stays
        return bits | (self.sign if negative else 0)

    def flushed(self, bits):
        return bits if bits & self.infinity else bits & self.sign


F16, BF16 = Format("f16", 5, 10), Format("bf16", 8, 7)
F32, F64 = Format("f32", 8, 23), Format("f64", 11, 52)


def special(form):
    """Where rules change: zeros, infinities, NaN, ends of the subnormal and of all numbers, one."""
    one = form.bias << form.mantissa_bits
    smallest = 1 << form.mantissa_bits
    magnitudes = (0, 1, 2, 3, smallest - 1, smallest, smallest + 1, one - 1, one, one + 1,
                  form.infinity - 1, form.infinity, form.infinity + 1, form.nan)  # fmt: skip
    return [bits | sign for bits in magnitudes for sign in (0, form.sign)]


def patterns(form, operands, seed, threads=THREADS):
    """Rows of operands: special ones, any, and such as cancel, tie and lie next to each other."""
    draw = random.Random(f"{form.name} {seed}")

    def near_one():
        exponent = form.bias + draw.randint(-3, 3) << form.mantissa_bits
        kept = draw.choice((1, 2, form.mantissa_bits))
        mantissa = draw.getrandbits(kept) << form.mantissa_bits - kept
        return exponent | mantissa ^ draw.choice((0, 0, 1)) | draw.choice((0, form.sign))

    def far_apart():
        exponent = draw.choice((-1, 0, 1)) * (form.mantissa_bits + draw.randint(0, 2))
        return (form.bias + exponent << form.mantissa_bits) + draw.choice((0, 1, -1))

    kinds = (
        lambda: draw.choice(special(form)),
        lambda: draw.getrandbits(form.bits),
        near_one, near_one, far_apart,
    )  # fmt: skip
    return [[draw.choice(kinds)() for _ in range(operands)] for _ in range(threads)]


def columns(rows, forms):
    return {
        name: np.array(column, f.dtype)
        for name, column, f in zip("abc", zip(*rows, strict=True), forms, strict=False)
    }


def assert_patterns(found, wanted, form, rows):
    for got, want, row in zip(found.tolist(), wanted, rows, strict=True):
        if form == F64 and want == form.nan:
            assert math.isnan(form.value(got)), row
        else:
            assert got == want, ([hex(b) for b in row], hex(got), hex(want))
