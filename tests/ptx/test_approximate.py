"""Functions of one number: within the bounds of the PTX ISA, and by its tables of special values."""

import math
from fractions import Fraction

import numpy as np
import pytest

from ptx.launch import UnknownInstruction
from ptx.patterns import BF16, F16, F32, NEAREST, THREADS
from ptx.snippets import evaluate

ALL = np.longdouble


@pytest.mark.parametrize(
    ("opcode", "true", "least", "most", "relative", "absolute"),
    [
        ("rcp.approx.f32", lambda x: 1 / x, -1e30, 1e30, 2**-23, 0),
        ("sqrt.approx.f32", np.sqrt, 0, 1e38, 2**-23, 0),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x), 1e-30, 1e30, 2**-22.9, 0),
        ("sin.approx.f32", np.sin, -np.pi, np.pi, 0, 2**-20.5),
        ("cos.approx.f32", np.cos, -np.pi, np.pi, 0, 2**-20.5),
        ("lg2.approx.f32", np.log2, 0.5, 2, 0, 2**-22),
        ("lg2.approx.ftz.f32", np.log2, 2, 1e38, 2**-22, 0),
        ("ex2.approx.f32", np.exp2, -126, 127, 2**-22, 0),
        ("ex2.approx.ftz.f32", np.exp2, -126, 127, 2**-22, 0),
        ("tanh.approx.f32", np.tanh, -10, 10, 2**-11, 0),
    ],
)
def test_approximations(opcode, true, least, most, relative, absolute):
    x = np.random.default_rng(0).uniform(least, most, THREADS).astype(np.float32)
    found = evaluate(f"{opcode} %d, %a;", {"d": np.float32}, a=x)["d"].astype(ALL)
    wanted = true(x.astype(ALL))
    assert (np.abs(found - wanted) <= relative * np.abs(wanted) + absolute).all()


@pytest.mark.parametrize(
    ("word", "true", "form", "relative"),
    [
        ("ex2.approx.{}", np.exp2, F16, 2**-9.9),
        ("ex2.approx.ftz.{}", np.exp2, BF16, 2**-7),
        ("tanh.approx.{}", np.tanh, F16, 2**-10.987),
        ("tanh.approx.{}", np.tanh, BF16, 2**-8),
    ],
)
def test_approximations_of_halves(word, true, form, relative):
    x = np.random.default_rng(0).uniform(-8, 8, 2 * THREADS)
    bits = np.array([form.rounded(Fraction(v), NEAREST) for v in x], np.uint16)
    opcode = word.format(form.name)
    code = f"{opcode} %d, %a; {opcode}x2 %e, %p;"
    pairs = bits.view(np.uint32)
    found = evaluate(code, {"d": np.uint16, "e": np.uint32}, a=bits[:THREADS], p=pairs)
    values = np.array([form.value(int(b)) for b in found["e"].view(np.uint16)])
    wanted = true(np.array([form.value(int(b)) for b in bits]))
    assert (np.abs(values - wanted) <= relative * np.abs(wanted)).all()
    assert (found["e"].view(np.uint16)[:THREADS] == found["d"]).all()


INF, NAN = math.inf, math.nan
SUBNORMAL = 2.0**-140


@pytest.mark.parametrize(
    ("opcode", "inputs", "outputs"),
    [
        ("rcp.approx.f32", (-INF, -0.0, 0.0, INF, NAN), (-0.0, -INF, INF, 0.0, NAN)),
        ("rcp.approx.ftz.f32", (SUBNORMAL, -SUBNORMAL, 2.0**127), (INF, -INF, 0.0)),
        ("rcp.approx.f32", (2.0**127, 2.0**-127), (2.0**-127, 2.0**127)),
        ("sqrt.approx.f32", (-INF, -1.0, -0.0, 0.0, INF, NAN), (NAN, NAN, -0.0, 0.0, INF, NAN)),
        ("sqrt.approx.ftz.f32", (-SUBNORMAL, SUBNORMAL), (-0.0, 0.0)),
        ("sqrt.approx.f32", (SUBNORMAL,), (2.0**-70,)),
        ("rsqrt.approx.f32", (-INF, -1.0, -0.0, 0.0, INF), (NAN, NAN, -INF, INF, 0.0)),
        ("rsqrt.approx.ftz.f32", (-SUBNORMAL, SUBNORMAL), (-INF, INF)),
        ("sin.approx.f32", (-INF, -0.0, 0.0, INF, NAN), (NAN, -0.0, 0.0, NAN, NAN)),
        ("sin.approx.ftz.f32", (-SUBNORMAL, SUBNORMAL), (-0.0, 0.0)),
        ("cos.approx.f32", (-INF, -0.0, 0.0, INF, NAN), (NAN, 1.0, 1.0, NAN, NAN)),
        ("lg2.approx.f32", (-INF, -1.0, -0.0, 0.0, INF), (NAN, NAN, -INF, -INF, INF)),
        ("lg2.approx.f32", (SUBNORMAL,), (-140.0,)),
        ("lg2.approx.ftz.f32", (SUBNORMAL, -SUBNORMAL), (-INF, -INF)),
        ("ex2.approx.f32", (-INF, -0.0, 0.0, INF, NAN, 3.0), (0.0, 1.0, 1.0, INF, NAN, 8.0)),
        ("ex2.approx.f32", (-140.0,), (SUBNORMAL,)),
        ("ex2.approx.ftz.f32", (-140.0,), (0.0,)),
        ("tanh.approx.f32", (-INF, -0.0, 0.0, INF, NAN), (-1.0, -0.0, 0.0, 1.0, NAN)),
        ("tanh.approx.f32", (SUBNORMAL,), (SUBNORMAL,)),
    ],
)
def test_special_values_of_approximations(opcode, inputs, outputs):
    a = np.array(inputs, np.float32)
    found = evaluate(f"{opcode} %d, %a;", {"d": np.float32}, a=a)["d"]
    wanted = np.array(outputs, np.float32)
    np.testing.assert_array_equal(found, wanted)
    number = ~np.isnan(wanted)
    assert (np.signbit(found) == np.signbit(wanted))[number].all()
    assert (found.view(np.uint32)[~number] == F32.nan).all()


@pytest.mark.parametrize("word", ["approx", "approx.ftz", "full", "full.ftz"])
def test_approximate_division(word):
    a, b = np.random.default_rng(1).uniform(-1e9, 1e9, (2, THREADS)).astype(np.float32)
    found = evaluate(f"div.{word}.f32 %d, %a, %b;", {"d": np.float32}, a=a, b=b)["d"]
    wanted = a.astype(ALL) / b.astype(ALL)
    assert (np.abs(found.astype(ALL) - wanted) <= 2 * np.spacing(np.abs(found))).all()


def test_approximate_division_by_the_largest_numbers():
    a = np.array([3.0, -3.0, INF, 2.0**127, 2.0**127, 1.0], np.float32)
    b = np.array([1.5 * 2.0**126, 2.0**127, 2.0**127, -(2.0**127), 2.0**126, INF], np.float32)
    code = "div.approx.f32 %d, %a, %b; div.full.f32 %e, %a, %b;"
    found = evaluate(code, {"d": np.float32, "e": np.float32}, a=a, b=b)
    np.testing.assert_array_equal(found["d"], np.float32([0, 0, NAN, 0, 2, 0]))
    full = a.astype(np.float64) / b.astype(np.float64)
    np.testing.assert_array_equal(found["e"], full.astype(np.float32))


@pytest.mark.parametrize(("word", "true"), [("rcp", lambda x: 1 / x), ("rsqrt", lambda x: x**-0.5)])
def test_gross_approximations_of_doubles(word, true):
    x = np.random.default_rng(2).uniform(1e-3, 1e3, THREADS)
    bits = evaluate(f"{word}.approx.ftz.f64 %d, %a;", {"d": np.uint64}, a=x)["d"]
    assert (bits & np.uint64(0xFFFF_FFFF) == 0).all()
    assert (np.abs(bits.view(np.float64) / true(x) - 1) < 2**-18).all()
    x = np.array([-INF, -0.0, 0.0, INF, NAN, 2.0**-1060, -(2.0**-1060)])
    found = evaluate(f"{word}.approx.ftz.f64 %d, %a;", {"d": np.float64}, a=x)["d"]
    wanted = [-0.0 if word == "rcp" else NAN, -INF, INF, 0.0, NAN, INF, -INF]
    np.testing.assert_array_equal(found, wanted)
    assert (found.view(np.uint64)[np.isnan(found)] == 0x7FFF_FFFF_0000_0000).all()


def test_reciprocal_roots_of_doubles():
    x = np.array([-1.0, -0.0, 0.0, INF, 0.25, 2.0**-1060])
    found = evaluate("rsqrt.approx.f64 %d, %a;", {"d": np.float64}, a=x)["d"]
    np.testing.assert_array_equal(found, [NAN, -INF, INF, 0.0, 2.0, 2.0**530])


@pytest.mark.parametrize(
    "instruction",
    [
        "rcp.f32 %d, %a",
        "rcp.approx.f64 %w, %w",
        "sin.f32 %d, %a",
        "sin.approx.f64 %w, %w",
        "ex2.approx.bf16 %h, %h",
        "ex2.approx.ftz.f16 %h, %h",
        "tanh.approx.f64 %w, %w",
        "tanh.approx.ftz.f32 %d, %a",
    ],
)
def test_what_the_isa_does_not_have_is_refused(instruction):
    registers, a = ".reg .b16 %h; .reg .b64 %w;", np.ones(1, np.float32)
    with pytest.raises(UnknownInstruction, match=instruction.split()[0].replace(".", r"\.")):
        evaluate(f"{instruction};", {"d": np.float32}, registers=registers, a=a)
