"""Numbers of every format, as fractions: what an operation's exact result is rounded to."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True)
class Format:
    """Binary floating-point numbers of ``precision`` bits, up to ``largest``."""

    precision: int
    smallest_exponent: int  # of a normal number
    largest: Fraction

    def rounded(self, exact: Fraction, to: str = "nearest") -> float:
        """The neighbour of ``exact``: nearest (ties to even), zero, down or up; beyond them infinity."""
        exponent = max(self.smallest_exponent, _exponent(exact))
        step = Fraction(2) ** (exponent - self.precision + 1)
        below = exact // step  # an integer
        rest = exact / step - below
        above = {
            "nearest": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2 == 1),
            "zero": exact < 0 and rest > 0,
            "down": False,
            "up": rest > 0,
        }[to]
        found = (below + above) * step
        if abs(found) <= self.largest:
            return float(found)
        inwards = to == "zero" or to == ("down" if exact > 0 else "up")
        size = float(self.largest) if inwards else float("inf")
        return size if exact > 0 else -size


def _exponent(exact: Fraction) -> int:
    """Of the greatest power of two that is not above it; of zero some small number."""
    size = exact.numerator.bit_length() - exact.denominator.bit_length()
    return size if Fraction(2) ** size <= abs(exact) else size - 1


def _ieee(precision: int, exponent_bits: int) -> Format:
    greatest = 2 ** (exponent_bits - 1) - 1
    largest = (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** greatest
    return Format(precision, 1 - greatest, largest)


F64, F32, F16, BF16 = _ieee(53, 11), _ieee(24, 8), _ieee(11, 5), _ieee(8, 8)
E5M2 = _ieee(3, 5)
E4M3 = Format(4, -6, Fraction(448))  # no infinity: one code more for numbers


def decoded(code: int, exponent_bits: int, mantissa_bits: int) -> Fraction | None:
    """The number that a code stands for; None where all bits of its exponent are ones."""
    sign = -1 if code >> (exponent_bits + mantissa_bits) else 1
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = Fraction(code & (1 << mantissa_bits) - 1, 1 << mantissa_bits)
    bias = (1 << exponent_bits - 1) - 1
    if exponent == (1 << exponent_bits) - 1:
        return None
    if exponent == 0:
        return sign * mantissa * Fraction(2) ** (1 - bias)
    return sign * (1 + mantissa) * Fraction(2) ** (exponent - bias)


def bf16_bits(value: float) -> int:
    """Of a number that is one of bf16's."""
    return int(np.float32(value).view(np.uint32)) >> 16
