"""Comparisons, what chooses by them, and properties of numbers, against Python's."""

import math
import operator

import numpy as np
import pytest

from ptx.launch import Fault, UnknownInstruction
from ptx.samples import BF16, F16, F32, F64, Kind, arrays, samples
from ptx.snippets import evaluate

ORDERED = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
UNSIGNED = {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}
BOOLEAN = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}
FLOATS = {kind.name: kind for kind in (F16, BF16, F32, F64)}


def is_nan(*values):
    return any(math.isnan(v) for v in values)


# Comparisons of floats: those of numbers, false or true of a NaN.
OF_FLOATS = {word: lambda a, b, f=f: not is_nan(a, b) and f(a, b) for word, f in ORDERED.items()}
OF_FLOATS |= {f"{w}u": lambda a, b, f=f: is_nan(a, b) or f(a, b) for w, f in ORDERED.items()}
OF_FLOATS["num"] = lambda a, b: not is_nan(a, b)
OF_FLOATS["nan"] = is_nan


def pairs(kind):
    """Two columns, of which every eighth row is equal."""
    a, b = samples(kind, kind)
    b[::8] = a[::8]
    return a, b


def values(kind, column, ftz=False):
    return [kind.value(kind.flushed(bits) if ftz else bits) for bits in column]


@pytest.mark.parametrize("name", ["b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64"])
def test_setp_of_integers(name):
    kind = Kind(name)
    words = dict(list(ORDERED.items())[:2]) if name[0] == "b" else dict(ORDERED)
    words |= UNSIGNED if name[0] == "u" else {}
    a, b = pairs(kind)
    got = evaluate(
        "\n".join(f"setp.{word}.{name} %{word}, %a, %b;" for word in words),
        dict.fromkeys(words, bool),
        **arrays((kind, kind), (a, b)),
    )
    for word, compare in words.items():
        assert got[word].tolist() == list(map(compare, a, b)), word


@pytest.mark.parametrize("opcode", ["f16", "ftz.f16", "bf16", "f32", "ftz.f32", "f64"])
def test_setp_of_floats(opcode):
    kind = FLOATS[opcode.split(".")[-1]]
    a, b = pairs(kind)
    x, y = (values(kind, column, "ftz" in opcode) for column in (a, b))
    got = evaluate(
        "\n".join(f"setp.{word}.{opcode} %{word}, %a, %b;" for word in OF_FLOATS),
        dict.fromkeys(OF_FLOATS, bool),
        **arrays((kind, kind), (a, b)),
    )
    for word, compare in OF_FLOATS.items():
        assert got[word].tolist() == list(map(compare, x, y)), word


@pytest.mark.parametrize("opcode", ["f16x2", "ftz.f16x2", "bf16x2"])
def test_setp_of_two_halves(opcode):
    kind = FLOATS[opcode.split(".")[-1][:-2]]
    a, b = pairs(kind)
    c, d = a[1:] + a[:1], b[3:] + b[:3]
    packed = [
        np.array([low | high << 16 for low, high in zip(*both, strict=True)], np.uint32)
        for both in ((a, c), (b, d))
    ]
    got = evaluate(
        "\n".join(f"setp.{word}.{opcode} %{word}_0|%{word}_1, %a, %b;" for word in OF_FLOATS)
        + f"setp.lt.{opcode} %first, %a, %b;",
        {f"{word}_{i}": bool for word in OF_FLOATS for i in range(2)} | {"first": bool},
        a=packed[0],
        b=packed[1],
    )
    for i, (left, right) in enumerate(((a, b), (c, d))):
        x, y = (values(kind, column, "ftz" in opcode) for column in (left, right))
        for word, compare in OF_FLOATS.items():
            assert got[f"{word}_{i}"].tolist() == list(map(compare, x, y)), word
    assert got["first"].tolist() == got["lt_0"].tolist()


@pytest.mark.parametrize("negated", [False, True])
@pytest.mark.parametrize("word", BOOLEAN)
@pytest.mark.parametrize("kind", [F32, Kind("s32")], ids=lambda k: k.name)
def test_a_comparison_is_combined_with_a_predicate(kind, word, negated):
    a, b = pairs(kind)
    c = np.arange(len(a)) % 3 == 0
    got = evaluate(
        f"setp.lt.{word}.{kind.name} %p|%q, %a, %b, {'!' if negated else ''}%c;"
        f" setp.lt.{word}.{kind.name} _|%r, %a, %b, {'!' if negated else ''}%c;"
        f" setp.lt.{word}.{kind.name} %s, %a, %b, 1;",
        dict.fromkeys("pqrs", bool),
        c=c,
        **arrays((kind, kind), (a, b)),
    )
    t = (
        list(map(OF_FLOATS["lt"], values(kind, a), values(kind, b)))
        if kind is F32
        else list(map(operator.lt, a, b))
    )
    t, c = np.array(t), ~c if negated else c
    assert got["p"].tolist() == BOOLEAN[word](t, c).tolist()
    assert got["q"].tolist() == got["r"].tolist() == BOOLEAN[word](~t, c).tolist()
    assert got["s"].tolist() == BOOLEAN[word](t, True).tolist()


def test_setp_of_halves_is_combined_half_by_half():
    a = np.array([0x3C004000, 0x40003C00] * 16, np.uint32)  # (2, 1) and (1, 2), low first
    b = np.full(32, 0x40004000, np.uint32)
    c = np.arange(32) % 4 < 2
    got = evaluate("setp.eq.xor.f16x2 %p|%q, %a, %b, %c;", {"p": bool, "q": bool}, a=a, b=b, c=c)
    low, high = np.arange(32) % 2 == 0, np.arange(32) % 2 == 1
    assert got["p"].tolist() == (low ^ c).tolist()
    assert got["q"].tolist() == (high ^ c).tolist()


# dtype: the register, what is written where it is true; one of floats is a pattern.
SETS = [
    ("u32", "u32", 0xFFFFFFFF), ("s32", "s64", 0xFFFFFFFF), ("f32", "u16", F32.one),
    ("f32", "f32", F32.one), ("u32", "f64", 0xFFFFFFFF), ("f16", "s32", F16.one),
    ("bf16", "f32", BF16.one), ("f16", "f64", F16.one), ("u16", "f16", 0xFFFF),
    ("s16", "bf16", 0xFFFF), ("s32", "f16", 0xFFFFFFFF), ("u32", "bf16", 0xFFFFFFFF),
    ("f16", "f16", F16.one), ("bf16", "bf16", BF16.one), ("f16", "b64", F16.one),
]  # fmt: skip


@pytest.mark.parametrize(("result", "source", "one"), SETS)
def test_set(result, source, one):
    kind = FLOATS.get(source) or Kind(source)
    a, b = pairs(kind)
    words = OF_FLOATS if source in FLOATS else ORDERED
    words = dict(list(words.items())[:2]) if source[0] == "b" and source != "bf16" else words
    width = "u2" if result[-2:] == "16" else "u4"
    got = evaluate(
        "\n".join(f"set.{word}.{result}.{source} %{word}, %a, %b;" for word in words),
        dict.fromkeys(words, width),
        **arrays((kind, kind), (a, b)),
    )
    x, y = (values(kind, c) if source in FLOATS else c for c in (a, b))
    for word, compare in words.items():
        expected = [one if compare(p, q) else 0 for p, q in zip(x, y, strict=True)]
        assert got[word].tolist() == expected, word


@pytest.mark.parametrize("name", ["f16x2", "bf16x2"])
def test_set_of_two_halves(name):
    kind = FLOATS[name[:-2]]
    a, b = pairs(kind)
    c, d = a[1:] + a[:1], b[3:] + b[:3]
    packed = [
        np.array([low | high << 16 for low, high in zip(*both, strict=True)], np.uint32)
        for both in ((a, c), (b, d))
    ]
    got = evaluate(
        f"set.leu.{name}.{name} %f, %a, %b; set.leu.u32.{name} %u, %a, %b;"
        f" set.leu.or.s32.{name} %s, %a, %b, %p;",
        dict.fromkeys("fus", np.uint32),
        a=packed[0],
        b=packed[1],
        p=np.ones(len(a), bool),
    )
    low = list(map(OF_FLOATS["leu"], values(kind, a), values(kind, b)))
    high = list(map(OF_FLOATS["leu"], values(kind, c), values(kind, d)))
    for register, one in ("f", kind.one), ("u", 0xFFFF):
        expected = [one * x | one * y << 16 for x, y in zip(low, high, strict=True)]
        assert got[register].tolist() == expected
    assert set(got["s"].tolist()) == {0xFFFFFFFF}


def test_set_flushes_and_combines():
    a, b = pairs(F32)
    c = np.arange(len(a)) % 3 == 0
    got = evaluate(
        "set.lt.ftz.f16.f32 %d, %a, %b; set.eq.and.ftz.u32.f32 %e, %a, %b, !%c;",
        {"d": np.uint16, "e": np.uint32},
        c=c,
        **arrays((F32, F32), (a, b)),
    )
    x, y = (values(F32, column, ftz=True) for column in (a, b))
    assert got["d"].tolist() == [F16.one * (p < q) for p, q in zip(x, y, strict=True)]
    expected = [0xFFFFFFFF * (p == q and not r) for p, q, r in zip(x, y, c, strict=True)]
    assert got["e"].tolist() == expected


# ---- What chooses


@pytest.mark.parametrize(
    "name", ["b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64"]
)
def test_selp_and_slct(name):
    kind = Kind("b" + name[1:])
    a, b = samples(kind, kind)
    (by_float,) = samples(F32, seed=5)
    (by_integer,) = samples(Kind("s32"), seed=6)
    p = np.arange(len(a)) % 3 == 0
    got = evaluate(
        f"selp.{name} %s, %a, %b, %p; selp.{name} %t, %a, %b, !%p; selp.{name} %u, 1, %b, 1;"
        f" slct.{name}.s32 %i, %a, %b, %n; slct.{name}.f32 %f, %a, %b, %x;"
        f" slct.ftz.{name}.f32 %g, %a, %b, %x;",
        dict.fromkeys("stuifg", kind.dtype),
        p=p,
        n=np.array(by_integer, np.int32),
        x=np.array(by_float, np.uint32),
        **arrays((kind, kind), (a, b)),
    )

    def chosen(condition):
        return [x if c else y for x, y, c in zip(a, b, condition, strict=True)]

    assert got["s"].tolist() == chosen(p)
    assert got["t"].tolist() == chosen(~p)
    assert set(got["u"].tolist()) == {1}
    assert got["i"].tolist() == chosen([n >= 0 for n in by_integer])
    assert got["f"].tolist() == chosen([v >= 0 for v in values(F32, by_float)])
    assert got["g"].tolist() == chosen([v >= 0 for v in values(F32, by_float, ftz=True)])


# ---- Properties


@pytest.mark.parametrize("kind", [F32, F64], ids=lambda k: k.name)
def test_testp(kind):
    (a,) = samples(kind)
    numbers = values(kind, a)
    properties = {
        "finite": [math.isfinite(v) for v in numbers],
        "infinite": [math.isinf(v) for v in numbers],
        "number": [not math.isnan(v) for v in numbers],
        "notanumber": [math.isnan(v) for v in numbers],
        "normal": [
            math.isfinite(v) and not kind.is_subnormal(bits)
            for v, bits in zip(numbers, a, strict=True)
        ],
        "subnormal": [kind.is_subnormal(bits) for bits in a],
    }
    got = evaluate(
        "\n".join(f"testp.{word}.{kind.name} %{word}, %a;" for word in properties),
        dict.fromkeys(properties, bool),
        **arrays((kind,), (a,)),
    )
    for word, expected in properties.items():
        assert got[word].tolist() == expected, word


@pytest.mark.parametrize("kind", [F32, F64], ids=lambda k: k.name)
def test_copysign(kind):
    a, b = samples(kind, kind)
    got = evaluate(
        f"copysign.{kind.name} %d, %a, %b;", {"d": kind.dtype}, **arrays((kind, kind), (a, b))
    )
    expected = [x & kind.sign | y & kind.sign - 1 for x, y in zip(a, b, strict=True)]
    assert got["d"].tolist() == expected


# ---- What has no value, and what isn't there

REGISTERS = ".reg .b32 %x; .reg .b16 %h; .reg .b64 %l; .reg .pred %q, %r, %n;"


@pytest.mark.parametrize(
    "code",
    [
        "setp.eq.s32 %q, %a, %x; selp.b32 %d, 1, 2, %q;",
        "setp.eq.and.s32 %q, %a, %x, 1; selp.b32 %d, 1, 2, %q;",
        "setp.eq.or.s32 %q, %a, %a, %r; setp.eq.xor.s32 %n, %a, %a, %r; selp.b32 %d, 1, 2, %n;",
        "set.eq.u32.s32 %d, %a, %x;",
        "selp.b32 %d, %a, %x, 0;",
        "slct.b32.s32 %d, %a, %x, -1;",
        "slct.b32.s32 %d, %a, %a, %x;",
        "testp.finite.f32 %q, %x; selp.b32 %d, 1, 2, %q;",
        "and.pred %q, %r, 1; selp.b32 %d, 1, 2, %q;",
        "xor.pred %q, %r, 1; selp.b32 %d, 1, 2, %q;",
        "not.pred %q, %r; selp.b32 %d, 1, 2, %q;",
        "mov.pred %q, %r; selp.b32 %d, 1, 2, %q;",
        "setp.eq.s32 %q, %a, %x; mov.u32 %d, 1; @%q mov.u32 %d, 2;",
    ],
)
def test_what_is_undefined_stays_so(code):
    with pytest.raises(Fault, match="undefined"):
        evaluate(code, {"d": np.uint32}, registers=REGISTERS, a=np.zeros(32, np.uint32))


@pytest.mark.parametrize(
    "code",
    [
        "selp.b32 %d, 1, %x, 1;",
        "selp.b32 %d, %x, 1, 0;",
        "slct.b32.s32 %d, 1, %x, 0;",
        "slct.b32.s32 %d, %x, 1, -1;",
        "setp.eq.or.s32 %q, %a, %x, 1; selp.b32 %d, 1, 2, %q;",
        "setp.eq.and.s32 %q, %a, %x, 0; selp.b32 %d, 2, 1, %q;",
        "and.pred %q, %r, 0; selp.b32 %d, 2, 1, %q;",
        "or.pred %q, %r, 1; selp.b32 %d, 1, 2, %q;",
        "setp.eq.s32 %n, %a, %a; or.pred %q, !%n, %n; or.pred %q, %r, %q; selp.b32 %d, 1, 2, %q;",
    ],
)
def test_what_does_not_decide_may_be_undefined(code):
    got = evaluate(code, {"d": np.uint32}, registers=REGISTERS, a=np.zeros(32, np.uint32))
    assert set(got["d"].tolist()) == {1}


@pytest.mark.parametrize("word", BOOLEAN)
def test_logic_of_predicates(word):
    p, q = np.array([0, 0, 1, 1] * 8, bool), np.array([0, 1, 0, 1] * 8, bool)
    got = evaluate(
        f"{word}.pred %d, %p, %q; {word}.pred %e, !%p, %q; {word}.pred %f, %p, !%q;"
        " not.pred %g, %p;",
        dict.fromkeys("defg", bool),
        p=p,
        q=q,
    )
    assert got["d"].tolist() == BOOLEAN[word](p, q).tolist()
    assert got["e"].tolist() == BOOLEAN[word](~p, q).tolist()
    assert got["f"].tolist() == BOOLEAN[word](p, ~q).tolist()
    assert got["g"].tolist() == (~p).tolist()


@pytest.mark.parametrize(
    "code",
    [
        "setp.lt.b32 %q, %a, %a;",
        "setp.lo.s32 %q, %a, %a;",
        "setp.equ.s32 %q, %a, %a;",
        "setp.eq.pred %q, %q, %q;",
        "setp.s32 %q, %a, %a;",
        "setp.eq %q, %a, %a;",
        "setp.eq.ftz.s32 %q, %a, %a;",
        "setp.lt.ftz.f64 %q, %l, %l;",
        "setp.lt.ftz.bf16 %q, %h, %h;",
        "setp.lt.f16 %q|%r, %h, %h;",
        "setp.eq.s32 %d, %a, %a;",
        "setp.eq.s32 %q, %a, %l;",
        "setp.eq.and.s32 %q, %a, %a;",
        "setp.eq.s32 %q, %a, %a, %r;",
        "setp.eq.nand.s32 %q, %a, %a, %r;",
        "set.eq.u64.u32 %l, %a, %a;",
        "set.eq.f32.f16 %d, %h, %h;",
        "set.eq.u16.u32 %h, %a, %a;",
        "set.eq.f16.f16x2 %h, %a, %a;",
        "set.eq.s16x2.f16x2 %d, %a, %a;",
        "set.eq.u32 %d, %a, %a;",
        "selp.f16 %h, %h, %h, %q;",
        "selp.b32 %d, %a, %a, %a;",
        "selp.b32 %d, %a, %h, %q;",
        "slct.b32.u32 %d, %a, %a, %a;",
        "slct.ftz.b32.s32 %d, %a, %a, %a;",
        "testp.finite.f16 %q, %h;",
        "testp.odd.f32 %q, %a;",
        "copysign.f16 %h, %h, %h;",
    ],
)
def test_what_is_not_there_is_refused(code):
    with pytest.raises(UnknownInstruction, match=code.split(" ")[0]):
        evaluate(code, {"d": np.uint32}, registers=REGISTERS, a=np.zeros(32, np.uint32))
