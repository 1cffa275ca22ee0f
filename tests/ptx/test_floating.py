"""Floating-point arithmetic against fractions: rounded once, by the definition of rounding."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest

from ptx.launch import Fault, UnknownInstruction
from ptx.patterns import (
    BF16,
    DOWN,
    F16,
    F32,
    F64,
    MODES,
    NEAREST,
    UP,
    assert_patterns,
    columns,
    patterns,
)  # fmt: skip
from ptx.snippets import evaluate


def root(value):
    """The square root, off by less than anything that matters to rounding where it is irrational."""
    bits = 4 * F64.bias
    found = Fraction(math.isqrt((value.numerator << 2 * bits) // value.denominator), 1 << bits)
    return found if found * found == value else found + Fraction(1, 1 << bits + 1)


OPERATIONS = {
    "add": (lambda x, y: x + y, 2),
    "sub": (lambda x, y: x - y, 2),
    "mul": (lambda x, y: x * y, 2),
    "fma": (lambda x, y, z: x * y + z, 3),
    "mad": (lambda x, y, z: x * y + z, 3),
    "div": (lambda x, y: x / y, 2),
    "rcp": (lambda x: 1 / x, 1),
    "sqrt": (root, 1),
}


def by_rule(word, values, mode):
    """A result that no fraction is: NaN, an infinity, or a zero with its sign; else None."""
    if any(map(math.isnan, values)):
        return math.nan
    # Only what kind of number each is matters where one isn't finite.
    kinds = [v if math.isinf(v) or v == 0 else math.copysign(1, v) for v in values]
    with np.errstate(all="ignore"):
        x = np.array(kinds)
        if word in ("add", "sub"):
            terms = [x[0], x[1] if word == "add" else -x[1]]
        elif word in ("fma", "mad"):
            terms = [x[0] * x[1], x[2]]
        elif word == "mul":
            return x[0] * x[1] if np.isinf(x).any() or (x == 0).any() else None
        elif word == "div":
            return x[0] / x[1] if np.isinf(x).any() or (x == 0).any() else None
        elif word == "rcp":
            return 1 / x[0] if np.isinf(x[0]) or x[0] == 0 else None
        else:
            return np.sqrt(x[0]) if np.isinf(x[0]) or x[0] <= 0 else None
        if not np.isfinite(terms).all():
            return terms[0] + terms[1]
        exact = OPERATIONS[word][0](*map(Fraction, values))
        if exact != 0:
            return None
        same = math.copysign(1, terms[0]) == math.copysign(1, terms[1])
        return math.copysign(0.0, terms[0]) if same else (-0.0 if mode == DOWN else 0.0)


def expected(word, form, bits, mode, ftz=False, clamp="", result=None, forms=None):
    """The pattern that an instruction must give for the patterns ``bits``."""
    result = result or form
    if ftz:
        bits = [form.flushed(b) for b in bits]
    values = [f.value(b) for f, b in zip(forms or [form] * len(bits), bits, strict=True)]
    known = by_rule(word, values, mode)
    if known is None:
        found = result.rounded(OPERATIONS[word][0](*map(Fraction, values)), mode)
    elif math.isnan(known):
        return 0 if clamp == "sat" else result.nan
    elif known == 0:
        found = result.rounded(0, mode, known)
    else:
        found = result.infinity | (result.sign if known < 0 else 0)
    if ftz:
        found = result.flushed(found)
    if clamp and found & result.sign:
        return 0
    return min(found, result.bias << result.mantissa_bits) if clamp == "sat" else found


def check(opcode, word, form, mode, ftz=False, clamp=""):
    rows = patterns(form, OPERATIONS[word][1], opcode)
    names = "".join(f", %{name}" for name in "abc"[: OPERATIONS[word][1]])
    inputs = columns(rows, [form] * 3)
    found = evaluate(f"{opcode} %d{names};", {"d": form.dtype}, **inputs)["d"]
    wanted = [expected(word, form, row, mode, ftz, clamp) for row in rows]
    assert_patterns(found, wanted, form, rows)


@pytest.mark.parametrize("form", [F32, F64], ids=lambda f: f.name)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("word", OPERATIONS)
def test_rounded_once(word, mode, form):
    check(f"{word}.{mode}.{form.name}", word, form, mode)


def test_roots_that_are_just_above_a_double():
    """Nearer to it than 64 bits can tell."""
    draw = random.Random(0)
    rows = []
    while len(rows) < 16:
        mantissa = draw.getrandbits(52) | 1 << 52
        square = mantissa * mantissa
        above = -square % (1 << square.bit_length() - 53)  # to the next double
        if 0 < above < 1 << 41:
            rows.append([np.float64(square + above).view(np.uint64).item()])
    a = np.array(rows, np.uint64).ravel()
    for mode in MODES:
        found = evaluate(f"sqrt.{mode}.f64 %d, %a;", {"d": np.uint64}, a=a)["d"]
        assert_patterns(found, [expected("sqrt", F64, row, mode) for row in rows], F64, rows)


@pytest.mark.parametrize("form", [F16, BF16], ids=lambda f: f.name)
@pytest.mark.parametrize("word", ["add", "sub", "mul", "fma"])
def test_halves_are_rounded_once(word, form):
    check(f"{word}.rn.{form.name}", word, form, NEAREST)


@pytest.mark.parametrize("word", ["add", "sub", "mul"])
@pytest.mark.parametrize("form", [F16, BF16, F32, F64], ids=lambda f: f.name)
def test_nearest_is_the_default(word, form):
    check(f"{word}.{form.name}", word, form, NEAREST)


@pytest.mark.parametrize(
    ("opcode", "form", "ftz", "clamp"),
    [
        ("add.ftz.f32", F32, True, ""),
        ("sub.rm.ftz.f32", F32, True, ""),
        ("mul.rp.ftz.f32", F32, True, ""),
        ("fma.rn.ftz.f32", F32, True, ""),
        ("div.rz.ftz.f32", F32, True, ""),
        ("rcp.rn.ftz.f32", F32, True, ""),
        ("sqrt.rn.ftz.f32", F32, True, ""),
        ("add.sat.f32", F32, False, "sat"),
        ("mul.rz.ftz.sat.f32", F32, True, "sat"),
        ("fma.rp.sat.f32", F32, False, "sat"),
        ("mad.rn.ftz.sat.f32", F32, True, "sat"),
        ("add.rn.ftz.f16", F16, True, ""),
        ("sub.sat.f16", F16, False, "sat"),
        ("mul.ftz.sat.f16", F16, True, "sat"),
        ("fma.rn.ftz.sat.f16", F16, True, "sat"),
        ("fma.rn.relu.f16", F16, False, "relu"),
        ("fma.rn.ftz.relu.f16", F16, True, "relu"),
        ("fma.rn.relu.bf16", BF16, False, "relu"),
    ],
)
def test_flushed_and_clamped(opcode, form, ftz, clamp):
    modes = [m for m in MODES if m in opcode.split(".")]
    check(opcode, opcode.split(".")[0], form, modes[0] if modes else NEAREST, ftz, clamp)


@pytest.mark.parametrize(
    ("opcode", "form", "mode", "ftz", "clamp"),
    [
        ("add.rn.f16x2", F16, NEAREST, False, ""),
        ("sub.ftz.f16x2", F16, NEAREST, True, ""),
        ("mul.sat.f16x2", F16, NEAREST, False, "sat"),
        ("fma.rn.f16x2", F16, NEAREST, False, ""),
        ("fma.rn.relu.f16x2", F16, NEAREST, False, "relu"),
        ("add.bf16x2", BF16, NEAREST, False, ""),
        ("sub.rn.bf16x2", BF16, NEAREST, False, ""),
        ("mul.rn.bf16x2", BF16, NEAREST, False, ""),
        ("fma.rn.bf16x2", BF16, NEAREST, False, ""),
        ("fma.rn.relu.bf16x2", BF16, NEAREST, False, "relu"),
        ("add.f32x2", F32, NEAREST, False, ""),
        ("sub.rm.f32x2", F32, DOWN, False, ""),
        ("mul.rn.ftz.f32x2", F32, NEAREST, True, ""),
        ("fma.rn.f32x2", F32, NEAREST, False, ""),
        ("fma.rp.ftz.f32x2", F32, UP, True, ""),
    ],
)
def test_pairs(opcode, form, mode, ftz, clamp):
    word = opcode.split(".")[0]
    count = OPERATIONS[word][1]
    low, high = patterns(form, count, opcode + "low"), patterns(form, count, opcode + "high")
    both = [
        [a | b << form.bits for a, b in zip(*rows, strict=True)]
        for rows in zip(low, high, strict=True)
    ]
    wide = np.dtype(f"u{2 * form.dtype.itemsize}")
    names = "".join(f", %{name}" for name in "abc"[:count])
    inputs = {
        name: np.array(column, wide)
        for name, column in zip("abc", zip(*both, strict=True), strict=False)
    }
    found = evaluate(f"{opcode} %d{names};", {"d": wide}, **inputs)["d"]
    mask = (1 << form.bits) - 1
    for rows, halves in ((low, found & wide.type(mask)), (high, found >> wide.type(form.bits))):
        wanted = [expected(word, form, row, mode, ftz, clamp) for row in rows]
        assert_patterns(halves, wanted, form, rows)


@pytest.mark.parametrize("half", [F16, BF16], ids=lambda f: f.name)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("word", ["add", "sub", "fma"])
@pytest.mark.parametrize("sat", ["", ".sat"])
def test_mixed_precision(word, mode, half, sat):
    count = OPERATIONS[word][1]
    halves, wide = patterns(half, count - 1, f"{word}{mode}"), patterns(F32, 1, f"{word}{mode}")
    rows = [a + b for a, b in zip(halves, wide, strict=True)]
    forms = [half] * (count - 1) + [F32]
    names = "".join(f", %{name}" for name in "abc"[:count])
    opcode = f"{word}.{mode}{sat}.f32.{half.name}"
    found = evaluate(f"{opcode} %d{names};", {"d": np.uint32}, **columns(rows, forms))["d"]
    wanted = [
        expected(word, half, row, mode, clamp=sat[1:], result=F32, forms=forms) for row in rows
    ]
    assert_patterns(found, wanted, F32, rows)


# ---- abs, neg


@pytest.mark.parametrize(
    ("kind", "form"),
    [("f32", F32), ("f64", F64), ("f16", F16), ("bf16", BF16), ("ftz.f32", F32), ("ftz.f16", F16)],
)
@pytest.mark.parametrize("word", ["abs", "neg"])
def test_signs(word, kind, form):
    rows = patterns(form, 1, word)
    found = evaluate(f"{word}.{kind} %d, %a;", {"d": form.dtype}, **columns(rows, [form]))["d"]
    for (bits,), got in zip(rows, found.tolist(), strict=True):
        value = form.value(form.flushed(bits) if "ftz" in kind else bits)
        want = abs(value) if word == "abs" else -value
        got = form.value(got)
        assert (
            math.isnan(got)
            if math.isnan(want)
            else (got, math.copysign(1, got))
            == (
                want,
                math.copysign(1, want),
            )
        )


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_signs_of_pairs(kind):
    a = np.array([0xC000_3C00, 0x4000_BC00], np.uint32)
    found = evaluate(f"abs.{kind} %d, %a; neg.{kind} %e, %a;", {"d": a.dtype, "e": a.dtype}, a=a)
    assert found["d"].tolist() == [0x4000_3C00, 0x4000_3C00]
    assert found["e"].tolist() == [0x4000_BC00, 0xC000_3C00]


# ---- min, max


def extreme(form, bits, most, ftz, nan_wins, xor_sign, absolute):
    """min and max by sorting numbers, a zero's sign after its value."""
    bits = [form.flushed(b) if ftz else b for b in bits]
    values = [form.value(b) for b in bits]
    if absolute:
        values = [abs(v) for v in values]
    numbers = [v for v in values if not math.isnan(v)]
    if not numbers or (nan_wins and len(numbers) < len(values)):
        return form.nan
    found = sorted(numbers, key=lambda v: (v, math.copysign(1, v)))[-1 if most else 0]
    if xor_sign:
        negative = sum(bool(b & form.sign) for b in bits) % 2 == 1
        found = -abs(found) if negative else abs(found)
    if math.isinf(found):
        return form.infinity | (form.sign if found < 0 else 0)
    return form.rounded(Fraction(found), NEAREST, found)


@pytest.mark.parametrize("word", ["min", "max"])
@pytest.mark.parametrize(
    ("modifiers", "form", "count"),
    [
        ("f32", F32, 2),
        ("ftz.f32", F32, 2),
        ("NaN.f32", F32, 2),
        ("ftz.NaN.f32", F32, 2),
        ("xorsign.abs.f32", F32, 2),
        ("ftz.NaN.xorsign.abs.f32", F32, 2),
        ("f32", F32, 3),
        ("ftz.abs.f32", F32, 3),
        ("NaN.f32", F32, 3),
        ("NaN.abs.f32", F32, 3),
        ("f64", F64, 2),
        ("f16", F16, 2),
        ("ftz.NaN.f16", F16, 2),
        ("xorsign.abs.f16", F16, 2),
        ("bf16", BF16, 2),
        ("NaN.xorsign.abs.bf16", BF16, 2),
    ],
)
def test_extremes(word, modifiers, form, count):
    rows = patterns(form, count, word + modifiers)
    names = "".join(f", %{name}" for name in "abc"[:count])
    inputs = columns(rows, [form] * 3)
    found = evaluate(f"{word}.{modifiers} %d{names};", {"d": form.dtype}, **inputs)["d"]
    flags = ["ftz", "NaN", "xorsign", "abs"]
    asked = [flag in modifiers.split(".") for flag in flags]
    assert_patterns(found, [extreme(form, r, word == "max", *asked) for r in rows], form, rows)


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_extremes_of_pairs(kind):
    a, b = np.array([0xC000_3C00], np.uint32), np.array([0x4000_BC00], np.uint32)
    code = f"min.{kind} %d, %a, %b; max.NaN.{kind} %e, %a, %b;"
    found = evaluate(code, {"d": a.dtype, "e": a.dtype}, a=a, b=b)
    assert (found["d"][0], found["e"][0]) == (0xC000_BC00, 0x4000_3C00)


# ---- Operands


def test_constants():
    code = "fma.rn.f32 %d, %a, 0f3F000000, 1.5; add.f64 %e, %b, 0d3FF0000000000000;"
    a, b = np.float32([1, 2]), np.array([1.0, 2.0])
    found = evaluate(code, {"d": np.float32, "e": np.float64}, a=a, b=b)
    assert (found["d"].tolist(), found["e"].tolist()) == ([2.0, 2.5], [2.0, 3.0])


@pytest.mark.parametrize(
    "code",
    [
        "add.f32 %d, %a, %u;",
        "fma.rn.f32 %d, %a, %a, %u;",
        "min.f32 %d, %u, %a;",
        "rcp.approx.f32 %d, %u;",
        "abs.f32 %d, %u;",
        "add.rn.f32.bf16 %d, %h, %a;",
    ],
)
def test_undefined_operands_make_undefined_results(code):
    a = np.ones(4, np.float32)
    registers = ".reg .b32 %u; .reg .b16 %h;"
    with pytest.raises(Fault, match="undefined"):
        evaluate(code, {"d": np.float32}, registers=registers, a=a)


def test_only_lanes_with_undefined_operands_have_undefined_results():
    a = np.float32([1, 2, 3, 4])
    code = "@%p mov.b32 %u, %a; add.f32 %u, %u, %a; @!%p mov.b32 %u, %a; mov.b32 %d, %u;"
    p = np.array([True, False, True, False])
    found = evaluate(code, {"d": np.float32}, registers=".reg .b32 %u;", a=a, p=p)["d"]
    assert found.tolist() == [2, 2, 6, 4]


@pytest.mark.parametrize(
    "instruction",
    [
        "add.rna.f32 %d, %a, %a",
        "add.rz.f16 %h, %h, %h",
        "add.ftz.bf16 %h, %h, %h",
        "add.sat.f32x2 %w, %w, %w",
        "add.ftz.f64 %w, %w, %w",
        "add.f32 %d, %a, %w",
        "add.f32 %d, %a",
        "add.f32 %d, %a, %p",
        "mul.rn.f32.bf16 %d, %h, %a",
        "fma.f32 %d, %a, %a, %a",
        "fma.rn.sat.relu.f16 %h, %h, %h, %h",
        "fma.rn.relu.f32 %d, %a, %a, %a",
        "fma.rn.oob.f16 %h, %h, %h, %h",
        "mad.f32 %d, %a, %a, %a",
        "div.f32 %d, %a, %a",
        "div.approx.f64 %w, %w, %w",
        "min.abs.f32 %d, %a, %a",
        "min.xorsign.f32 %d, %a, %a",
        "min.NaN.f64 %w, %w, %w",
        "max.f16 %h, %h, %h, %h",
        "abs.f32x2 %w, %w",
    ],
)
def test_what_the_isa_does_not_have_is_refused(instruction):
    registers = ".reg .b16 %h; .reg .b64 %w; .reg .pred %p;"
    with pytest.raises(UnknownInstruction, match=instruction.split()[0].replace(".", r"\.")):
        evaluate(
            f"{instruction};", {"d": np.float32}, registers=registers, a=np.ones(1, np.float32)
        )
