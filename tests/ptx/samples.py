"""Operands for tests of instructions: corners in random combinations, and random numbers."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .patterns import Format

THREADS = 1024


@dataclass(frozen=True)
class Kind:
    """An integer type of PTX: ``s32``, ``u16``, ``b64``; ``pred`` has one bit."""

    name: str

    @cached_property
    def bits(self):
        return 1 if self.name == "pred" else int(self.name[1:])

    @cached_property
    def signed(self):
        return self.name[0] == "s"

    @cached_property
    def least(self):
        return -(1 << self.bits - 1) if self.signed else 0

    @cached_property
    def most(self):
        return (1 << self.bits - self.signed) - 1

    @cached_property
    def dtype(self):
        if self.name == "pred":
            return np.dtype(bool)
        return np.dtype(f"{'i' if self.signed else 'u'}{max(self.bits, 8) // 8}")

    def wrapped(self, value):
        """The value's lower bits, as a number of this type."""
        value &= (1 << self.bits) - 1
        return value - (1 << self.bits) if value > self.most else value

    def clamped(self, value):
        return min(max(value, self.least), self.most)

    def corners(self):
        near = [0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 255, 256]
        mixed = [0x5555_5555_5555_5555, 0x8040_2010_0804_0201, 0x0000_FFFF_7FFF_8000]
        values = [self.least, self.least + 1, self.most, self.most - 1, *near]
        values += [-v for v in near] + mixed + [1 << b for b in range(4, self.bits, 5)]
        return sorted({self.wrapped(v) for v in values})


@dataclass(frozen=True)
class Float(Format):
    """A floating-point type by its patterns: ``f32``, ``bf16``, ``e4m3``."""

    top: str = "infinity"
    """What the largest exponent holds: "infinity" and NaNs, one "nan", or "numbers"."""

    @cached_property
    def largest(self):
        """The pattern of the largest number."""
        return {"infinity": self.infinity, "nan": self.sign - 1, "numbers": self.sign}[self.top] - 1

    @cached_property
    def one(self):
        return self.bias << self.mantissa_bits

    def wrapped(self, bits):
        return bits & (2 * self.sign - 1)

    def is_nan(self, bits):
        magnitude = bits & self.sign - 1
        return magnitude > self.largest and (self.top == "nan" or magnitude != self.infinity)

    def is_subnormal(self, bits):
        return 0 < bits & self.sign - 1 < 1 << self.mantissa_bits

    def value(self, bits):
        """As a double, which holds every number of these types."""
        magnitude = bits & self.sign - 1
        sign = -1.0 if bits & self.sign else 1.0
        if magnitude > self.largest:
            return math.nan if self.is_nan(bits) else sign * math.inf
        exponent, mantissa = divmod(magnitude, 1 << self.mantissa_bits)
        if exponent:
            mantissa += 1 << self.mantissa_bits
        return sign * math.ldexp(mantissa, max(exponent, 1) - self.bias - self.mantissa_bits)

    def corners(self):
        smallest = 1 << self.mantissa_bits  # normal
        values = [0, 1, 2, 3, smallest - 1, smallest, smallest + 1, self.one - 1, self.one]
        values += [self.one + 1, self.one + smallest // 2, self.largest - 1, self.largest]
        if self.top == "infinity":
            values += [self.infinity, self.infinity + 1, self.sign - 1, self.sign - smallest // 2]
        return sorted({v | sign for v in values for sign in (0, self.sign)})


F16, BF16 = Float("f16", 5, 10), Float("bf16", 8, 7)
F32, F64 = Float("f32", 8, 23), Float("f64", 11, 52)


def samples(*kinds, seed=0, count=THREADS):
    """A list of Python integers for each kind; of floating-point types their patterns."""
    random = np.random.default_rng([seed, *kinds[0].name.encode()])
    columns = []
    for kind in kinds:
        corners = kind.corners()
        column = [corners[i] for i in random.integers(len(corners), size=count)]
        for i in range(count * 3 // 4, count):
            value = int.from_bytes(random.bytes(8), "little")
            if isinstance(kind, Kind):
                # Few bits as often as many.
                value >>= int(random.integers(64))
            column[i] = kind.wrapped(-value if random.integers(2) else value)
        columns.append(column)
    return columns


def arrays(kinds, columns):
    """The same as NumPy arrays, named a, b, c and so on."""
    return {
        name: np.array(column, kind.dtype)
        for name, kind, column in zip("abcdefgh", kinds, columns, strict=False)
    }
