"""Kernels whose rows are an operation each: executed, and held against a definition of every element."""

from fractions import Fraction

import numpy as np

from .cuda_cases import launch
from .exact import Format
from .launch import In, Out

THREADS = 64
N = 190  # elements, of which the last block's last threads have none
NAN, INF = float("nan"), float("inf")


def rows_of(source, kernel, arch, inputs, definitions, *outputs):
    """Executes a kernel that writes a row for each definition; the rows."""
    named = [In(f"input {i}", x) for i, x in enumerate(inputs)]
    outs = [np.zeros((rows, N), dtype) for rows, dtype in outputs]
    arguments = [*named, *(Out(f"output {i}", o) for i, o in enumerate(outs)), N]
    launch(source, kernel, arch, -(-N // THREADS), THREADS, arguments)
    rows = [row for out in outs for row in out]
    assert len(rows) == len(definitions)
    return rows


def same(found, expected):
    """Equal, or both NaN. Only an expected NumPy number says which zero it is."""
    if expected != expected:
        return found != found
    signs = isinstance(expected, np.floating) and expected == 0
    if signs and np.signbit(found) != np.signbit(expected):
        return False
    return float(found) == float(expected)  # of two types NumPy would take the narrower


def check(definitions, rows, inputs, agree=same):
    """Every element of every row is what its definition says of the inputs' elements."""
    for (name, definition), row in zip(definitions, rows, strict=True):
        for i, values in enumerate(zip(*inputs, strict=True)):
            with np.errstate(all="ignore"):
                expected = definition(*values)
            assert agree(row[i], expected), f"{name}{values} is {expected}, not {row[i]}"


def drawn(dtype, seed):
    """Floats of all sizes, and every special one against others."""
    rng = np.random.default_rng(seed)
    info = np.finfo(dtype)
    sizes = np.exp2(rng.uniform(-8, 8, N)) * rng.choice([-1, 1], N)
    wild = rng.integers(0, 10, N) == 0
    sizes[wild] *= np.exp2(rng.uniform(info.minexp / 2, info.maxexp / 2, wild.sum()))
    sizes[rng.integers(0, 6, N) == 0] = rng.integers(-4, 5)  # ties, and equal numbers
    special = [
        0.0, -0.0, INF, -INF, NAN, 1.0, -1.0, 0.5, 2.5, -3.5, info.max, -info.max, info.tiny,
        -info.tiny, info.smallest_subnormal, info.tiny * 0.75,
    ]  # fmt: skip
    places = rng.choice(N, 3 * len(special), replace=False)
    sizes = sizes.astype(dtype)
    sizes[places] = np.array(special * 3, dtype)
    return sizes


def signed(value, bits=32):
    return (value + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)


def clamped(value, low=-(1 << 31), high=(1 << 31) - 1):
    return max(low, min(high, value))


def drawn_integers(bits, seed, zero=True):
    """Of every length, and the ends of the range."""
    rng = np.random.default_rng(seed)
    values = [int(rng.integers(-(1 << 62), 1 << 62)) >> int(rng.integers(62)) for _ in range(N)]
    ends = [0, 1, -1, 2, -(1 << bits - 1), (1 << bits - 1) - 1, 1 << bits - 2, 255, -256, 77]
    for place, value in zip(rng.choice(N, 5 * len(ends), replace=False), ends * 5, strict=True):
        values[place] = value
    found = np.array([signed(v, bits) for v in values], f"int{bits}")
    return found if zero else np.where(found == 0, 3, found)


def exactly(operation, format: Format, to="nearest"):
    """The exact result of finite numbers, rounded; of others, what float64 says.

    Takes as many numbers as the operation and ignores the rest.
    """
    count = operation.__code__.co_argcount

    def of(*values):
        values = values[:count]
        if all(map(np.isfinite, values)):
            try:
                return format.rounded(
                    Fraction(operation(*(Fraction(float(v)) for v in values))), to
                )
            except ZeroDivisionError:
                pass
        return float(operation(*map(np.float64, values)))

    return of


def add(a, b):
    return a + b


def subtract(a, b):
    return a - b


def multiply(a, b):
    return a * b


def divide(a, b):
    return a / b


def fma(a, b, c):
    return a * b + c


def saturated(a):
    return 0.0 if a != a else float(min(max(a, 0), 1))


def relative(bits, absolute=0.0):
    """Within 2^-bits of the exact result, or ``absolute``."""
    return lambda found, exact: abs(float(found) - exact) <= max(abs(exact) * 2.0**-bits, absolute)


def integer(rounding, bits, signs, if_nan=0):
    """A float as an integer of the range that it ends at."""
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signs else (0, (1 << bits) - 1)

    def of(a):
        if a != a:
            return if_nan
        return (
            clamped(rounding(Fraction(float(a))), low, high)
            if np.isfinite(a)
            else (high if a > 0 else low)
        )

    return of
