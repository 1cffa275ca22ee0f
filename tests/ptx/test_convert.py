"""cvt against fractions: the number of a type that the definition of each rounding chooses."""

import bisect
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from ptx.launch import Fault, UnknownInstruction
from ptx.samples import BF16, F16, F32, F64, Float, Kind, arrays, samples
from ptx.snippets import evaluate

FLOATS = (F16, BF16, F32, F64)
INTEGERS = tuple(Kind(f"{sign}{bits}") for sign in "us" for bits in (8, 16, 32, 64))
SMALL = {
    "e4m3": Float("e4m3", 4, 3, "nan"),
    "e5m2": Float("e5m2", 5, 2),
    "e2m3": Float("e2m3", 2, 3, "numbers"),
    "e3m2": Float("e3m2", 3, 2, "numbers"),
    "e2m1": Float("e2m1", 2, 1, "numbers"),
}
TF32 = Float("tf32", 8, 10)
ROUNDINGS = ("rn", "rz", "rm", "rp")
INTEGRAL = ("rni", "rzi", "rmi", "rpi")


def is_exact(to, source):
    return to.exponent_bits >= source.exponent_bits and to.mantissa_bits >= source.mantissa_bits


def whole(value, mode):
    """The integer that a fraction is rounded to."""
    return {"n": round, "z": math.trunc, "m": math.floor, "p": math.ceil}[mode[1]](value)


def rounded(kind, value, mode, finite=False):
    """The pattern of a float (infinite or NaN) or of a fraction; None for a NaN."""
    if isinstance(value, float) and math.isnan(value):
        return kind.largest if kind.top == "numbers" else None
    sign = kind.sign if math.copysign(1, value) < 0 else 0
    infinity = kind.largest if finite else kind.infinity
    if isinstance(value, float) and math.isinf(value):
        return sign | infinity
    magnitude = abs(Fraction(value))
    # Patterns rise as numbers do. A double is compared faster than a fraction, and as exactly.
    double = float(magnitude)
    compared = double if double == magnitude else magnitude
    low = bisect.bisect_right(range(kind.largest + 1), compared, key=kind.value) - 1
    below = Fraction(kind.value(low))
    if low < kind.largest:
        step = Fraction(kind.value(low + 1)) - below
    else:
        step = below - Fraction(kind.value(low - 1))
    part = (magnitude - below) / step
    half = Fraction(1, 2)
    up = {
        "rn": part > half or (part == half and low % 2 == 1),
        "rna": part >= half,
        "rz": False,
        "rm": part > 0 and sign,
        "rp": part > 0 and not sign,
    }[mode]
    result = low + bool(up)
    return sign | (infinity if result > kind.largest else result)


def value_of(kind, bits):
    """A float where it is infinite, a NaN or a zero, which has a sign; else a fraction."""
    value = kind.value(bits)
    return value if value == 0 or not math.isfinite(value) else Fraction(value)


def same(kind, got, expected):
    """Patterns, equal or both of a NaN."""
    return all(kind.is_nan(g) if e is None else g == e for g, e in zip(got, expected, strict=True))


def sources(source, to, seed=0):
    """Patterns of a type, many of them near numbers of another and half-way between two."""
    (bits,) = samples(source, seed=seed, count=512)
    (near,) = samples(to, seed=seed + 1, count=512)
    for i, pattern in enumerate(near[::2]):
        magnitude = min(pattern & to.sign - 1, to.largest - 1)
        ends = [Fraction(to.value(magnitude + j)) for j in (0, 1)]
        value = [ends[0], sum(ends) / 2, ends[1]][i % 3]
        found = rounded(source, value, "rn", finite=True) + (0, 0, 0, 1, -1)[i % 5]
        bits[2 * i] = source.wrapped(found | (source.sign if pattern & to.sign else 0))
    return bits


def saturated(kind, bits):
    """.sat: into 0 to 1, a NaN to 0."""
    if bits is None or bits & kind.sign:
        return 0
    return min(bits, kind.one)


def flushed(kind, bits):
    return bits if bits is None or kind is not F32 else kind.flushed(bits)


# ---- Floats


@pytest.mark.parametrize(
    ("to", "source"),
    list(itertools.permutations(FLOATS, 2)),
    ids=lambda k: k.name,
)
def test_floats_to_floats(to, source):
    bits = sources(source, to)
    opcodes, expected = {}, {}
    modes = ("",) if is_exact(to, source) else ROUNDINGS
    for i, (mode, ftz, sat) in enumerate(itertools.product(modes, (False, True), (False, True))):
        if (sat and to is BF16) or (ftz and F32 not in (to, source)):
            continue
        words = [mode] * bool(mode) + ["ftz"] * ftz + ["sat"] * sat
        opcodes[f"d{i}"] = ".".join(["cvt", *words, to.name, source.name])
        column = [flushed(source, b) if ftz else b for b in bits]
        results = [rounded(to, value_of(source, b), mode or "rn") for b in column]
        if sat:
            results = [saturated(to, b) for b in results]
        expected[f"d{i}"] = [flushed(to, b) if ftz else b for b in results]
    got = evaluate(
        "\n".join(f"{opcode} %{name}, %a;" for name, opcode in opcodes.items()),
        dict.fromkeys(opcodes, to.dtype),
        **arrays((source,), (bits,)),
    )
    for name, opcode in opcodes.items():
        assert same(to, got[name].tolist(), expected[name]), opcode


@pytest.mark.parametrize("kind", FLOATS, ids=lambda k: k.name)
def test_floats_to_integral_floats(kind):
    bits = sources(kind, kind)
    for i in range(0, len(bits), 4):  # halves, and what is near
        half = rounded(kind, Fraction(i // 4 - 64, 2), "rn")
        bits[i] = kind.wrapped(half + i // 4 % 3 - 1)
    values = [value_of(kind, b) for b in bits]
    words = [*INTEGRAL, *(["sat", "rni.sat"] if kind is not BF16 else []), "plain"]
    words += ["ftz", "rpi.ftz"] if kind is F32 else []
    got = evaluate(
        "\n".join(
            f"cvt.{word}.{kind.name}.{kind.name} %d{i}, %a;".replace(".plain", "")
            for i, word in enumerate(words)
        ),
        {f"d{i}": kind.dtype for i in range(len(words))},
        **arrays((kind,), (bits,)),
    )
    for i, word in enumerate(words):
        column = [value_of(kind, kind.flushed(b)) for b in bits] if "ftz" in word else values
        if word[0] == "r":
            column = [
                v if isinstance(v, float) else math.copysign(whole(v, word), v) for v in column
            ]
        expected = [rounded(kind, v, "rn") for v in column]
        if "sat" in word:
            expected = [saturated(kind, b) for b in expected]
        assert same(kind, got[f"d{i}"].tolist(), expected), word


@pytest.mark.parametrize("to", [F16, BF16], ids=lambda k: k.name)
@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_relu_and_satfinite(to, mode):
    bits = sources(F32, to)
    bits[:4] = [0x477FF000, 0xFF800000, 0x7F800000, 0xFF7FFFFF]
    values = [value_of(F32, b) for b in bits]
    words = ["relu", "satfinite", "relu.satfinite"]
    got = evaluate(
        "\n".join(f"cvt.{mode}.{w}.{to.name}.f32 %d{i}, %a;" for i, w in enumerate(words)),
        {f"d{i}": to.dtype for i in range(3)},
        **arrays((F32,), (bits,)),
    )
    for i, word in enumerate(words):
        expected = [rounded(to, v, mode, finite="satfinite" in word) for v in values]
        if "relu" in word:  # a NaN stays, as the canonical one
            expected = [0x7FFF if b is None else 0 if b & to.sign else b for b in expected]
        assert same(to, got[f"d{i}"].tolist(), expected), word


def test_bfloat16_needs_no_rounding_to_wider_types_but_may_have_one():
    (bits,) = samples(BF16)
    got = evaluate(
        "cvt.rp.f64.bf16 %d, %a; cvt.rz.f32.bf16 %e, %a;",
        {"d": np.uint64, "e": np.uint32},
        **arrays((BF16,), (bits,)),
    )
    for kind, name in (F64, "d"), (F32, "e"):
        expected = [rounded(kind, value_of(BF16, b), "rn") for b in bits]
        assert same(kind, got[name].tolist(), expected)


@pytest.mark.parametrize(
    ("word", "mode"), [("rna", "rna"), ("rn", "rn"), ("rz", "rz"), ("rn.relu", "rn")]
)
@pytest.mark.parametrize("finite", [False, True])
def test_tf32(word, mode, finite):
    bits = sources(F32, TF32)
    got = evaluate(
        f"cvt.{word}{'.satfinite' * finite}.tf32.f32 %d, %a;",
        {"d": np.uint32},
        **arrays((F32,), (bits,)),
    )["d"].tolist()
    expected = [rounded(TF32, value_of(F32, b), mode, finite) for b in bits]
    if "relu" in word:
        expected = [0 if b and b & TF32.sign else b for b in expected]
    assert not any(b & 0x1FFF for b in got)
    assert same(TF32, [b >> 13 for b in got], expected)


# ---- Integers


@pytest.mark.parametrize("source", INTEGERS, ids=lambda k: k.name)
def test_integers_to_floats(source):
    (numbers,) = samples(source, count=320)
    if source.bits == 64:  # ties, and what is just beside them
        for i in range(0, len(numbers), 3):
            top = 1 << 10 + i % 52
            numbers[i] = source.wrapped((2 * i + 1) * top + i % 7 - 3)
    opcodes = {
        f"d{i}": (to, mode) for i, (to, mode) in enumerate(itertools.product(FLOATS, ROUNDINGS))
    }
    got = evaluate(
        "\n".join(
            f"cvt.{mode}.{to.name}.{source.name} %{name}, %a;"
            for name, (to, mode) in opcodes.items()
        )
        + f"cvt.rn.sat.f32.{source.name} %s, %a; cvt.rn.ftz.f32.{source.name} %t, %a;",
        {name: to.dtype for name, (to, _) in opcodes.items()} | {"s": "u4", "t": "u4"},
        **arrays((source,), (numbers,)),
    )
    for name, (to, mode) in opcodes.items():
        expected = [rounded(to, Fraction(n), mode) for n in numbers]
        assert got[name].tolist() == expected, (to.name, mode)
    assert got["s"].tolist() == [F32.one * (n > 0) for n in numbers]
    assert got["t"].tolist() == [rounded(F32, Fraction(n), "rn") for n in numbers]


@pytest.mark.parametrize("source", FLOATS, ids=lambda k: k.name)
@pytest.mark.parametrize("to", INTEGERS, ids=lambda k: k.name)
def test_floats_to_integers(to, source):
    (bits,) = samples(source, count=512)
    (near,) = samples(to, seed=1, count=512)
    for i in range(0, len(bits), 2):  # integers of the type, beside them and half-way between
        pattern = rounded(source, near[i] + Fraction(i % 8 // 2, 4), "rn", finite=True)
        bits[i] = source.wrapped(pattern + (0, 0, 1, -1)[i // 8 % 4])
    words = [*INTEGRAL, "rzi.sat"] + (["rpi.ftz"] if source is F32 else [])
    got = evaluate(
        "\n".join(f"cvt.{w}.{to.name}.{source.name} %d{i}, %a;" for i, w in enumerate(words)),
        {f"d{i}": to.dtype for i in range(len(words))},
        **arrays((source,), (bits,)),
    )

    def expected(pattern, word):
        value = value_of(source, source.flushed(pattern) if "ftz" in word else pattern)
        if isinstance(value, float) and math.isnan(value):
            return 0 if source is not F64 and to.bits < 64 else to.wrapped(1 << to.bits - 1)
        if isinstance(value, float) and math.isinf(value):
            return to.most if value > 0 else to.least
        return to.clamped(whole(value, word))

    for i, word in enumerate(words):
        assert got[f"d{i}"].tolist() == [expected(b, word) for b in bits], word


@pytest.mark.parametrize("source", INTEGERS, ids=lambda k: k.name)
def test_integers_to_integers(source):
    (numbers,) = samples(source)
    saturates = [to for to in INTEGERS if to.least > source.least or to.most < source.most]
    code = [f"cvt.{to.name}.{source.name} %{to.name}, %a;" for to in INTEGERS]
    code += [f"cvt.sat.{to.name}.{source.name} %sat_{to.name}, %a;" for to in saturates]
    got = evaluate(
        "\n".join(code),
        {to.name: to.dtype for to in INTEGERS} | {f"sat_{to.name}": to.dtype for to in saturates},
        **arrays((source,), (numbers,)),
    )
    for to in INTEGERS:
        assert got[to.name].tolist() == [to.wrapped(n) for n in numbers], to.name
    for to in saturates:
        assert got[f"sat_{to.name}"].tolist() == [to.clamped(n) for n in numbers], to.name


@pytest.mark.parametrize("to", INTEGERS[:3] + INTEGERS[4:7], ids=lambda k: k.name)
def test_a_wider_register_is_extended(to):
    (numbers,) = samples(Kind("s64"))
    (floats,) = samples(F32)
    wider = [n for n in (16, 32, 64) if n > to.bits]
    got = evaluate(
        "\n".join(f"cvt.{to.name}.s64 %w{n}, %a; cvt.rzi.{to.name}.f32 %f{n}, %b;" for n in wider),
        {f"{x}{n}": f"{'i' if to.signed else 'u'}{n // 8}" for x in "wf" for n in wider},
        a=np.array(numbers, np.int64),
        b=np.array(floats, np.uint32),
    )
    for n in wider:
        assert got[f"w{n}"].tolist() == [to.wrapped(v) for v in numbers]
        assert max(got[f"f{n}"].tolist()) == to.most
        assert min(got[f"f{n}"].tolist()) == to.least


def test_the_lower_part_of_a_wider_register_is_taken():
    (numbers,) = samples(Kind("u32"))
    got = evaluate(
        "cvt.s32.s8 %d, %a; cvt.u64.u16 %e, %a; cvt.f32.f16 %f, %a; cvt.rn.f16.f32 %g, %f;",
        {"d": np.int32, "e": np.uint64, "f": np.uint32, "g": np.uint32},
        a=np.array(numbers, np.uint32),
    )
    assert got["d"].tolist() == [Kind("s8").wrapped(n) for n in numbers]
    assert got["e"].tolist() == [n & 0xFFFF for n in numbers]
    expected = [rounded(F32, value_of(F16, n & 0xFFFF), "rn") for n in numbers]
    assert same(F32, got["f"].tolist(), expected)
    back = [None if F16.is_nan(n & 0xFFFF) else n & 0xFFFF for n in numbers]
    assert same(F16, got["g"].tolist(), back)
    assert not any(g >> 16 for g in got["g"].tolist())


# ---- Pairs


def both(kind, high, low, width):
    """Packed patterns; None is the canonical NaN."""
    canonical = kind.sign - 1
    return [
        (canonical if h is None else h) << width | (canonical if w is None else w)
        for h, w in zip(high, low, strict=True)
    ]


@pytest.mark.parametrize("to", [F16, BF16], ids=lambda k: k.name)
@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("word", ["", ".relu", ".satfinite", ".relu.satfinite"])
def test_two_floats_to_halves(to, mode, word):
    a, b = sources(F32, to), sources(F32, to, seed=7)
    got = evaluate(
        f"cvt.{mode}{word}.{to.name}x2.f32 %d, %a, %b;",
        {"d": np.uint32},
        **arrays((F32, F32), (a, b)),
    )["d"]

    def part(bits):
        result = rounded(to, value_of(F32, bits), mode, finite="satfinite" in word)
        return 0 if "relu" in word and result is not None and result & to.sign else result

    # a is the upper half
    assert got.tolist() == both(to, map(part, a), map(part, b), 16)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("relu", [False, True])
def test_two_floats_to_small_ones(name, relu):
    to = SMALL[name]
    a, b = sources(F32, to), sources(F32, to, seed=7)
    width = 4 if name == "e2m1" else 8
    out = "cvt.u16.u8 %d, %small;" if width == 4 else "mov.b16 %d, %small;"
    got = evaluate(
        f"cvt.rn.satfinite{'.relu' * relu}.{name}x2.f32 %small, %a, %b; {out}",
        {"d": np.uint16},
        registers=f".reg .b{2 * width} %small;",
        **arrays((F32, F32), (a, b)),
    )["d"]

    def part(bits):
        result = rounded(to, value_of(F32, bits), "rn", finite=True)
        return 0 if relu and result is not None and result & to.sign else result

    assert got.tolist() == both(to, map(part, a), map(part, b), width)


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_halves_to_eight_bits(name):
    to = SMALL[name]
    a, b = sources(F16, to), sources(F16, to, seed=7)
    got = evaluate(
        f"mov.b32 %x, {{%b, %a}}; cvt.rn.satfinite.{name}x2.f16x2 %d, %x;"
        f" cvt.rn.satfinite.relu.{name}x2.f16x2 %e, %x;",
        {"d": np.uint16, "e": np.uint16},
        registers=".reg .b32 %x;",
        **arrays((F16, F16), (a, b)),
    )
    parts = [[rounded(to, value_of(F16, bits), "rn", finite=True) for bits in c] for c in (a, b)]
    assert got["d"].tolist() == both(to, *parts, 8)
    clamped = [[0 if p and p & to.sign else p for p in column] for column in parts]
    assert got["e"].tolist() == both(to, *clamped, 8)


@pytest.mark.parametrize("name", SMALL)
def test_small_ones_to_halves(name):
    kind = SMALL[name]
    width = 4 if name == "e2m1" else 8
    # Every pattern in both places.
    patterns = [(p, (7 * p + 3) % (2 * kind.sign)) for p in range(2 * kind.sign)]
    a = np.array([high << width | low for high, low in patterns], np.uint16)
    into = "cvt.u8.u16 %small, %a;" if width == 4 else "mov.b16 %small, %a;"
    got = evaluate(
        f"{into} cvt.rn.f16x2.{name}x2 %d, %small; cvt.rn.relu.f16x2.{name}x2 %e, %small;",
        {"d": np.uint32, "e": np.uint32},
        registers=f".reg .b{2 * width} %small;",
        a=a,
    )
    parts = [[rounded(F16, value_of(kind, p[i]), "rn") for p in patterns] for i in range(2)]
    assert got["d"].tolist() == both(F16, *parts, 16)
    clamped = [[0 if p and p & F16.sign else p for p in column] for column in parts]
    assert got["e"].tolist() == both(F16, *clamped, 16)


def power_of_two(value, mode, finite):
    """The code of the power that a magnitude lies at or above (rz), at or below (rp)."""
    if math.isnan(value):
        return 255
    powers = [math.ldexp(1, code - 127) for code in range(255)]
    if math.isinf(value):
        code = 255
    elif mode == "rz":
        code = max((i for i, p in enumerate(powers) if p <= abs(value)), default=0)
    else:
        code = min((i for i, p in enumerate(powers) if p >= abs(value)), default=255)
    return 254 if code == 255 and finite else code


@pytest.mark.parametrize("mode", ["rz", "rp"])
@pytest.mark.parametrize("finite", [False, True])
def test_powers_of_two(mode, finite):
    a, b = (samples(F32, seed=s, count=256)[0] for s in (0, 1))
    a[:9] = [
        0x7F7FFFFF,
        0x7F000000,
        0x7F000001,
        0x00400000,
        0x00400001,
        0x003FFFFF,
        1,
        0,
        0x7F800000,
    ]
    word = f"{mode}{'.satfinite' * finite}"
    got = evaluate(
        f"cvt.{word}.ue8m0x2.f32 %d, %a, %b; mov.b32 %x, {{%h, %g}}; mov.b32 {{_, %g}}, %a;"
        f" mov.b32 {{_, %h}}, %b; mov.b32 %x, {{%h, %g}}; cvt.{word}.ue8m0x2.bf16x2 %e, %x;",
        {"d": np.uint16, "e": np.uint16},
        registers=".reg .b32 %x; .reg .b16 %g, %h;",
        **arrays((F32, F32), (a, b)),
    )
    codes = [[power_of_two(F32.value(bits), mode, finite) for bits in c] for c in (a, b)]
    assert got["d"].tolist() == [h << 8 | w for h, w in zip(*codes, strict=True)]
    codes = [[power_of_two(BF16.value(bits >> 16), mode, finite) for bits in c] for c in (a, b)]
    assert got["e"].tolist() == [h << 8 | w for h, w in zip(*codes, strict=True)]


def test_powers_of_two_to_bfloat16():
    codes = np.arange(256)
    a = (codes << 8 | 255 - codes).astype(np.uint16)
    got = evaluate("cvt.rn.bf16x2.ue8m0x2 %d, %a;", {"d": np.uint32}, a=a)["d"].tolist()
    for code, pair in enumerate(got):
        for bits, exponent in (pair >> 16, code), (pair & 0xFFFF, 255 - code):
            value = BF16.value(bits)
            assert math.isnan(value) if exponent == 255 else value == 2.0 ** (exponent - 127)


@pytest.mark.parametrize("name", ["u16", "s16", "u8", "s8", "u4", "s4", "u2", "s2"])
def test_pack(name):
    kind, s32 = Kind(name), Kind("s32")
    a, b, c = samples(s32, s32, Kind("b32"))
    wide = kind.bits == 16
    got = evaluate(
        f"cvt.pack.sat.{name}.s32 %d, %a, %b;"
        if wide
        else f"cvt.pack.sat.{name}.s32.b32 %d, %a, %b, %c;",
        {"d": np.uint32},
        **arrays((s32, s32, Kind("b32")), (a, b, c)),
    )["d"]
    mask = (1 << kind.bits) - 1
    expected = [
        (kind.clamped(x) & mask) << kind.bits
        | kind.clamped(y) & mask
        | (0 if wide else z << 2 * kind.bits & 0xFFFFFFFF)
        for x, y, z in zip(a, b, c, strict=True)
    ]
    assert got.tolist() == expected


# ---- What has no value, and what isn't there

REGISTERS = ".reg .b32 %x; .reg .b16 %h, %y; .reg .b64 %l; .reg .b8 %b;"


@pytest.mark.parametrize(
    "code",
    [
        "cvt.u32.s32 %d, %x;",
        "cvt.rn.f32.s32 %d, %x;",
        "cvt.rzi.s32.f32 %d, %x;",
        "cvt.f32.bf16 %d, %y;",
        "cvt.ftz.f32.bf16 %d, %y;",
        "cvt.rn.bf16x2.f32 %d, %a, %x;",
        "cvt.rn.f16x2.f32 %d, %x, %a;",
        "cvt.rn.f16x2.e4m3x2 %d, %y;",
        "cvt.rna.tf32.f32 %d, %x;",
        "cvt.pack.sat.u8.s32.b32 %d, %a, %a, %x;",
    ],
)
def test_what_is_undefined_stays_so(code):
    with pytest.raises(Fault, match="undefined"):
        evaluate(code, {"d": np.uint32}, registers=REGISTERS, a=np.zeros(32, np.uint32))


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("cvt.rs.f16x2.f32 %d, %a, %a, %a;", "stochastic"),
        ("cvt.s32.f32 %d, %a;", "needs .rni"),
        ("cvt.rn.s32.f32 %d, %a;", "needs .rni"),
        ("cvt.f32.s32 %d, %a;", "rounding"),
        ("cvt.rni.f32.s32 %d, %a;", "rounding"),
        ("cvt.f16.f32 %h, %a;", "rounding"),
        ("cvt.rni.f16.f32 %h, %a;", "same type"),
        ("cvt.rni.bf16.f16 %h, %h;", "same type"),
        ("cvt.rn.f32.f16 %d, %h;", "what fits"),
        ("cvt.rn.f32.f32 %d, %a;", "what fits"),
        ("cvt.rna.bf16.f32 %h, %a;", "rounding"),
        ("cvt.rn.sat.bf16.f32 %h, %a;", "modifier"),
        ("cvt.rn.relu.f16.f64 %h, %l;", "modifier"),
        ("cvt.ftz.f64.f16 %l, %h;", "modifier"),
        ("cvt.sat.s32.u8 %d, %h;", "modifier"),
        ("cvt.rn.u32.s32 %d, %a;", "rounds no integer"),
        ("cvt.rm.f16x2.f32 %d, %a, %a;", "rounding"),
        ("cvt.rn.f16x2.f32 %d, %a;", "operands"),
        ("cvt.rn.sat.f16x2.f32 %d, %a, %a;", "modifier"),
        ("cvt.rna.relu.tf32.f32 %d, %a;", "modifier"),
        ("cvt.rn.e4m3x2.f32 %h, %a, %a;", "needs .satfinite"),
        ("cvt.rz.satfinite.e4m3x2.f32 %h, %a, %a;", "rounding"),
        ("cvt.rn.satfinite.e4m3x2.bf16x2 %h, %a;", "bf16x2"),
        ("cvt.rn.satfinite.e2m3x2.f16x2 %h, %a;", "f16x2"),
        ("cvt.rn.bf16x2.e4m3x2 %d, %h;", "bf16x2"),
        ("cvt.rn.ue8m0x2.f32 %h, %a, %a;", "rounding"),
        ("cvt.rz.relu.ue8m0x2.bf16x2 %h, %a;", "modifier"),
        ("cvt.rzi.s32.f32 %h, %a;", "32 bits"),
        ("cvt.u64.u32 %l, %h;", "32 bits"),
        ("cvt.rn.bf16.f32 %d, %a;", "16 bits"),
        ("cvt.f32.bf16 %d, %a;", "16 bits"),
        ("cvt.pack.sat.u8.s32 %d, %a, %a, %a;", "b32"),
        ("cvt.pack.u16.s32 %d, %a, %a;", "sat"),
        ("cvt.u32.b32 %d, %a;", "b32"),
        ("cvt.u32 %d, %a;", "cvt"),
    ],
)
def test_what_is_not_there_is_refused(code, why):
    with pytest.raises(UnknownInstruction, match=why):
        evaluate(code, {"d": np.uint32}, registers=REGISTERS, a=np.zeros(32, np.uint32))
