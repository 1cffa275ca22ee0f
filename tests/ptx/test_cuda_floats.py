"""What nvcc makes of floats, against fractions and NumPy's float64."""

import math
from fractions import Fraction

import numpy as np

from ptx.cuda_cases import archs, needs_nvcc
from ptx.cuda_rows import (
    INF,
    NAN,
    N,
    add,
    check,
    divide,
    drawn,
    drawn_integers,
    exactly,
    fma,
    integer,
    multiply,
    relative,
    rows_of,
    same,
    saturated,
    signed,
)
from ptx.exact import F32, F64

pytestmark = needs_nvcc


def root_down(a):
    """√|a|, rounded down."""
    root = F32.rounded(Fraction(float(np.sqrt(np.float64(abs(a)))))) if np.isfinite(a) else abs(a)
    over = math.isfinite(root) and Fraction(root) ** 2 > Fraction(float(abs(a)))
    return np.nextafter(np.float32(root), np.float32(-INF)) if over else root


def half_away(a):
    return np.copysign(np.floor(np.float64(abs(a)) + 0.5), a)


ONE = np.float32(1)
FLOATS = {
    "add": lambda a, b, c: a + b,
    "subtract": lambda a, b, c: a - b,
    "multiply": lambda a, b, c: a * b,
    "divide": lambda a, b, c: a / b,
    "sqrt": lambda a, b, c: np.sqrt(abs(a)),
    "fma.rn": exactly(fma, F32),
    "fma.rz": exactly(fma, F32, "zero"),
    "fma.rm": exactly(fma, F32, "down"),
    "fma.rp": exactly(fma, F32, "up"),
    "add.rz": exactly(add, F32, "zero"),
    "add.rm": exactly(add, F32, "down"),
    "add.rp": exactly(add, F32, "up"),
    "mul.rz": exactly(multiply, F32, "zero"),
    "mul.rm": exactly(multiply, F32, "down"),
    "mul.rp": exactly(multiply, F32, "up"),
    "div.rz": exactly(divide, F32, "zero"),
    "sqrt.rm": lambda a, b, c: root_down(a),
    "rcp.rn": lambda a, b, c: ONE / b,
    "rcp.rp": lambda a, b, c: exactly(divide, F32, "up")(ONE, b),
    "fmin": lambda a, b, c: float(np.fmin(a, b)),
    "fmax": lambda a, b, c: float(np.fmax(a, b)),
    "abs": lambda a, b, c: abs(a),
    "neg": lambda a, b, c: -a,
    "copysign": lambda a, b, c: np.copysign(a, b),
    "floor": lambda a, b, c: np.floor(a),
    "ceil": lambda a, b, c: np.ceil(a),
    "trunc": lambda a, b, c: np.trunc(a),
    "rint": lambda a, b, c: np.rint(a),
    "round": lambda a, b, c: half_away(a),
    "saturate": lambda a, b, c: saturated(a),
    "less": lambda a, b, c: a if a < b else c,
    "isnan, isinf": lambda a, b, c: 1 if np.isnan(a) else 2 if np.isinf(a) else 3,
    "signbit": lambda a, b, c: int(np.signbit(a)),
    "bits": lambda a, b, c: (a.view(np.int32) + np.int32(1)).view(np.float32),
}


@archs(75, 90)
def test_floats(arch):
    inputs = [drawn(np.float32, seed) for seed in range(3)]
    # Which NaN it is has a sign and an end: not those that become numbers, or lose their sign.
    inputs[0][np.isnan(inputs[0])] = np.float32(NAN)
    rows = rows_of("floats", "floats", arch, inputs, FLOATS.items(), (len(FLOATS), np.float32))
    check(FLOATS.items(), rows, inputs)


NEAR = {  # the function in float64, and what is allowed: the ISA's and the programming guide's errors
    "div.approx": (lambda a, b: a / b, relative(22)),
    "rsqrt": (lambda a, b: 1 / np.sqrt(b), relative(22)),
    "rcp.approx": (lambda a, b: 1 / b, relative(23)),
    "sqrt.approx": (lambda a, b: np.sqrt(b), relative(22)),
    "ex2.approx": (lambda a, b: np.exp2(a), relative(22)),
    "lg2.approx": (lambda a, b: np.log2(b), relative(22, 2.0**-22)),
    "sin.approx": (lambda a, b: np.sin(a), relative(40, 2.0**-20)),
    "cos.approx": (lambda a, b: np.cos(a), relative(40, 2.0**-20)),
    "expf, fast": (lambda a, b: np.exp(a), relative(20)),
    "logf, fast": (lambda a, b: np.log(b), relative(21, 2.0**-21)),
    "tanh.approx": (lambda a, b: np.tanh(a), relative(10)),
    "expf": (lambda a, b: np.exp(a), relative(22)),
    "exp2f": (lambda a, b: np.exp2(a), relative(22)),
    "logf": (lambda a, b: np.log(b), relative(22, 2.0**-24)),
    "sinf": (lambda a, b: np.sin(np.float64(np.float32(a) * np.float32(1e6))), relative(21)),
    "cosf": (lambda a, b: np.cos(a), relative(21)),
    "tanhf": (lambda a, b: np.tanh(a), relative(22)),
    "erff": (lambda a, b: math.erf(a), relative(22)),
    "powf": (lambda a, b: b**a, relative(21)),
    "cbrtf": (lambda a, b: np.cbrt(a), relative(22)),
    "fmodf": (lambda a, b: np.fmod(a, b), relative(60)),
}


@archs(75, 90)
def test_floats_near(arch):
    rng = np.random.default_rng(5)
    a = rng.uniform(-3, 3, N).astype(np.float32)
    b = np.exp(rng.uniform(-7, 7, N)).astype(np.float32)
    rows = rows_of("floats", "floats_near", arch, [a, b], NEAR, (len(NEAR), np.float32))
    for (name, (definition, agree)), row in zip(NEAR.items(), rows, strict=True):
        check([(name, definition)], [row], [a.astype(np.float64), b.astype(np.float64)], agree)


def bits_of(a, b):
    """The upper half of a's bits, the lower of b's."""
    low = np.uint64(0xFFFFFFFF)
    return (a.view(np.uint64) & ~low | b.view(np.uint64) & low).view(np.float64)


DOUBLES = {
    "add": lambda a, b, i: a + b,
    "subtract": lambda a, b, i: a - b,
    "multiply": lambda a, b, i: a * b,
    "divide": lambda a, b, i: a / b,
    "sqrt": lambda a, b, i: np.sqrt(abs(a)),
    "fma": lambda a, b, i: exactly(fma, F64)(a, b, a),
    "add.rz": lambda a, b, i: exactly(add, F64, "zero")(a, b),
    "mul.rp": lambda a, b, i: exactly(multiply, F64, "up")(a, b),
    "fmin": lambda a, b, i: float(np.fmin(a, b)),
    "fmax": lambda a, b, i: float(np.fmax(a, b)),
    "abs": lambda a, b, i: abs(a),
    "copysign": lambda a, b, i: np.copysign(a, b),
    "floor": lambda a, b, i: np.floor(a),
    "rint": lambda a, b, i: np.rint(a),
    "trunc": lambda a, b, i: np.trunc(a),
    "to float": lambda a, b, i: float(np.float32(a)),
    "to float, down": lambda a, b, i: exactly(lambda x: x, F32, "down")(a),
    "to integer": lambda a, b, i: float(np.trunc(a)),
    "from unsigned": lambda a, b, i: float(i * 3000000000 % (1 << 32)),
    "exp": lambda a, b, i: np.exp(a / 100),
    "log": lambda a, b, i: np.log(abs(a)),
    "less": lambda a, b, i: int(a < b),
    "halves": lambda a, b, i: bits_of(a, b),
}


def nearly(found, expected):
    """The same, or a unit in the last place off: exp and log are not rounded exactly."""
    return same(found, expected) or abs(found - expected) <= 2.0**-51 * abs(expected)


@archs(80)
def test_doubles(arch):
    a, b = drawn(np.float64, 3), drawn(np.float64, 4)
    a[~(abs(a) < 1e5)] = -0.0  # that an integer holds, and whose exp is finite
    indices = np.arange(N)
    rows = rows_of("floats", "doubles", arch, [a, b], DOUBLES, (len(DOUBLES), np.float64))
    for (name, definition), row in zip(DOUBLES.items(), rows, strict=True):
        agree = nearly if name in ("exp", "log") else same
        check(
            [(name, lambda a, b, i, of=definition: of(a, b, int(i)))], [row], [a, b, indices], agree
        )


WIDE_NAN = 1 << 63
TO_INTEGERS = {
    "rn.s32": integer(round, 32, True),
    "rz.s32": integer(math.trunc, 32, True),
    "rm.s32": integer(math.floor, 32, True),
    "rp.s32": integer(math.ceil, 32, True),
    "rn.u32": integer(round, 32, False),
    "rz.u32": integer(math.trunc, 32, False),
    "rm.u32": integer(math.floor, 32, False),
    "rp.u32": integer(math.ceil, 32, False),
    "f64 rn.s32": lambda a: integer(round, 32, True, 1 << 31)(np.float64(a) * 1.000000001),
    "f64 rz.u32": integer(math.trunc, 32, False, 1 << 31),
    "rn.sat.s8": integer(round, 8, True),
    "rz.sat.u16": integer(math.trunc, 16, False),
    "rn.s64": integer(round, 64, True, WIDE_NAN),
    "rz.s64": integer(math.trunc, 64, True, WIDE_NAN),
    "rm.s64": integer(math.floor, 64, True, WIDE_NAN),
    "rp.u64": integer(math.ceil, 64, False, WIDE_NAN),
}


@archs(75, 90)
def test_floats_to_integers(arch):
    x = drawn(np.float32, 6)
    with np.errstate(over="ignore"):
        x[::7] *= np.float32(2.0**27)
        x[3::7] *= np.float32(2.0**58)
    rows = rows_of("floats", "to_integers", arch, [x], TO_INTEGERS, (12, np.int32), (4, np.int64))
    narrow, wide = list(TO_INTEGERS.items())[:12], list(TO_INTEGERS.items())[12:]
    check(narrow, rows[:12], [x], lambda found, expected: int(found) == signed(expected))
    check(wide, rows[12:], [x], lambda found, expected: int(found) == signed(expected, 64))


def number(format, to, bits, signs):
    """An integer's lowest bits as a float."""

    def of(a):
        value = int(a) % (1 << bits)
        return format.rounded(Fraction(signed(value, bits) if signs else value), to)

    return of


FROM_INTEGERS = {
    "rn.f32.s32": number(F32, "nearest", 32, True),
    "rz.f32.s32": number(F32, "zero", 32, True),
    "rm.f32.s32": number(F32, "down", 32, True),
    "rp.f32.s32": number(F32, "up", 32, True),
    "rn.f32.u32": number(F32, "nearest", 32, False),
    "rz.f32.u32": number(F32, "zero", 32, False),
    "rm.f32.u32": number(F32, "down", 32, False),
    "rp.f32.u32": number(F32, "up", 32, False),
    "rn.f32.s64": number(F32, "nearest", 64, True),
    "rz.f32.s64": number(F32, "zero", 64, True),
    "rp.f32.u64": number(F32, "up", 64, False),
    "f32.s16": number(F32, "nearest", 16, True),
    "f32.u8": number(F32, "nearest", 8, False),
    "f32.s8": number(F32, "nearest", 8, True),
    "rn.f64.s32": number(F64, "nearest", 32, True),
    "rn.f64.s64": number(F64, "nearest", 64, True),
    "rm.f64.s64": number(F64, "down", 64, True),
    "rp.f64.u64": number(F64, "up", 64, False),
}


@archs(75, 90)
def test_integers_to_floats(arch):
    x = drawn_integers(64, 7)
    rows = rows_of(
        "floats", "from_integers", arch, [x], FROM_INTEGERS, (14, np.float32), (4, np.float64)
    )
    check(FROM_INTEGERS.items(), rows, [x])


def flushed(definition):
    """Numbers below the smallest normal one are zeros of their sign, before and after."""

    def zeroed(a):
        return (
            np.copysign(np.float32(0), a) if abs(a) < np.finfo(np.float32).tiny else np.float32(a)
        )

    return lambda a, b: zeroed(definition(zeroed(a), zeroed(b)))


SMALL_FLOATS = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "add.ftz": flushed(add),
    "mul.ftz": flushed(multiply),
    "fma.ftz": flushed(lambda a, b: exactly(fma, F32)(a, b, a)),
    "max.ftz": lambda a, b: float(flushed(np.fmax)(a, b)),
    "abs.ftz": flushed(lambda a, b: abs(a)),
    "add.sat": lambda a, b: saturated(a + b),
    "fma.sat": lambda a, b: saturated(exactly(fma, F32)(a, b, b)),
    "setp.eq.ftz": lambda a, b: int(flushed(lambda x, y: np.float32(x == y))(a, b)),
    "setp.geu": lambda a, b: int(not a < b),
}


@archs(75, 90)
def test_small_floats(arch):
    inputs = [drawn(np.float32, seed) for seed in (8, 9)]
    tiny = np.finfo(np.float32).tiny
    rng = np.random.default_rng(10)
    for x in inputs:  # half of them around the smallest normal number, and below
        few = rng.choice(N, N // 2, replace=False)
        x[few] = rng.uniform(-4, 4, N // 2) * tiny * 2.0 ** rng.integers(-20, 2, N // 2)
    rows = rows_of(
        "floats", "small_floats", arch, inputs, SMALL_FLOATS, (len(SMALL_FLOATS), np.float32)
    )
    # A zero of fma has the sign that the definition's fraction doesn't know.
    check(
        SMALL_FLOATS.items(), rows, inputs,
        lambda found, expected: same(found, float(expected)),
    )  # fmt: skip
