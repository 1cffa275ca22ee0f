"""Integer instructions against Python's integers."""

import itertools

import numpy as np
import pytest

from ptx.launch import Fault, UnknownInstruction
from ptx.samples import Kind, arrays, samples
from ptx.snippets import evaluate

U16, U32, U64 = Kind("u16"), Kind("u32"), Kind("u64")
S16, S32, S64 = Kind("s16"), Kind("s32"), Kind("s64")
B16, B32, B64 = Kind("b16"), Kind("b32"), Kind("b64")
INTEGERS = (U16, U32, U64, S16, S32, S64)
TWICE = {U16: U32, U32: U64, S16: S32, S32: S64}


def truncated(a, b):
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


def lower_24(value, kind):
    value &= 0xFFFFFF
    return value - (1 << 24) if kind.signed and value >> 23 else value


def halves(function, kind):
    """``function`` of the lower 16 bits, and of the upper ones."""

    def of(a, b):
        parts = [
            function(kind.wrapped(a >> shift), kind.wrapped(b >> shift)) & 0xFFFF
            for shift in (0, 16)
        ]
        return parts[0] | parts[1] << 16

    return of


def bit(value, i):
    return value >> i & 1


def from_bits(bits):
    return sum(b << i for i, b in enumerate(bits))


def found(a, kind):
    """bfind: the highest bit that differs from the sign."""
    differing = [i for i in range(kind.bits) if bit(a, i) != (a < 0)]
    return differing[-1] if differing else -1


def extracted(a, position, length, kind):
    position, length = position & 255, length & 255
    top = kind.bits - 1
    sign = bit(a, min(position + length - 1, top)) if kind.signed and length else 0
    return from_bits(
        bit(a, position + i) if i < length and position + i <= top else sign
        for i in range(kind.bits)
    )


def inserted(a, b, position, length, kind):
    position, length = position & 255, length & 255
    return from_bits(
        bit(a, i - position) if position <= i < position + length else bit(b, i)
        for i in range(kind.bits)
    )


def mask(position, width, wrap):
    if wrap:
        position, width = position % 32, width % 32
    return from_bits(position <= i < position + width for i in range(32))


def extended(a, width, kind, wrap):
    if width >= 32 and not wrap:
        return a
    width %= 32
    if width == 0:
        return 0
    low = a % (1 << width)
    return low - (1 << width) if kind.signed and bit(low, width - 1) else low


def nth_bit(value, base, offset):
    if offset == 0:
        return base if bit(value, base) else -1
    positions = range(base, 32) if offset > 0 else range(base, -1, -1)
    places = [i for i in positions if bit(value, i)]
    return places[abs(offset) - 1] if abs(offset) <= len(places) else -1


def cases():
    """Opcode: the type of the result, those of the sources, the definition."""
    for k in INTEGERS:
        n = k.bits
        yield f"add.{k.name}", k, (k, k), lambda a, b: a + b
        yield f"sub.{k.name}", k, (k, k), lambda a, b: a - b
        yield f"mul.lo.{k.name}", k, (k, k), lambda a, b: a * b
        yield f"mul.hi.{k.name}", k, (k, k), lambda a, b, n=n: a * b >> n
        yield f"mad.lo.{k.name}", k, (k, k, k), lambda a, b, c: a * b + c
        yield f"mad.hi.{k.name}", k, (k, k, k), lambda a, b, c, n=n: (a * b >> n) + c
        if k in TWICE:
            w = TWICE[k]
            yield f"mul.wide.{k.name}", w, (k, k), lambda a, b: a * b
            yield f"mad.wide.{k.name}", w, (k, k, w), lambda a, b, c: a * b + c
        yield f"sad.{k.name}", k, (k, k, k), lambda a, b, c: c + abs(a - b)
        yield f"div.{k.name}", k, (k, k), lambda a, b: truncated(a, b or 1)
        yield f"rem.{k.name}", k, (k, k), lambda a, b: a - truncated(a, b or 1) * (b or 1)
        yield f"min.{k.name}", k, (k, k), min
        yield f"max.{k.name}", k, (k, k), max
        yield f"shr.{k.name}", k, (k, U32), lambda a, by: a >> by
    for k in (S16, S32, S64):
        yield f"abs.{k.name}", k, (k,), abs
        yield f"neg.{k.name}", k, (k,), lambda a: -a
    yield "add.sat.s32", S32, (S32, S32), lambda a, b: S32.clamped(a + b)
    yield "sub.sat.s32", S32, (S32, S32), lambda a, b: S32.clamped(a - b)
    yield "mad.hi.sat.s32", S32, (S32,) * 3, lambda a, b, c: S32.clamped((a * b >> 32) + c)
    for k in (U32, S32):
        low = lambda v, k=k: lower_24(v, k)  # noqa: E731
        yield f"mul24.lo.{k.name}", k, (k, k), lambda a, b, f=low: f(a) * f(b)
        yield f"mul24.hi.{k.name}", k, (k, k), lambda a, b, f=low: f(a) * f(b) >> 16
        yield f"mad24.lo.{k.name}", k, (k,) * 3, lambda a, b, c, f=low: f(a) * f(b) + c
        yield f"mad24.hi.{k.name}", k, (k,) * 3, lambda a, b, c, f=low: (f(a) * f(b) >> 16) + c
    yield (
        "mad24.hi.sat.s32",
        S32,
        (S32,) * 3,
        lambda a, b, c: S32.clamped(S32.wrapped(lower_24(a, S32) * lower_24(b, S32) >> 16) + c),
    )
    for k in (U16, S16):
        yield f"add.{k.name}x2", B32, (B32, B32), halves(lambda a, b: a + b, k)
        yield f"min.{k.name}x2", B32, (B32, B32), halves(min, k)
        yield f"max.{k.name}x2", B32, (B32, B32), halves(max, k)
    yield "min.relu.s16x2", B32, (B32, B32), halves(lambda a, b: max(0, min(a, b)), S16)
    yield "max.relu.s16x2", B32, (B32, B32), halves(lambda a, b: max(0, a, b), S16)
    yield "min.s16x2.relu", B32, (B32, B32), halves(lambda a, b: max(0, min(a, b)), S16)
    yield "min.relu.s32", S32, (S32, S32), lambda a, b: max(0, min(a, b))
    yield "max.relu.s32", S32, (S32, S32), lambda a, b: max(0, a, b)
    yield from bit_cases()
    yield from dot_cases()


def bit_cases():
    for k in (B32, B64):
        n = k.bits
        yield f"popc.{k.name}", U32, (k,), lambda a: bin(a).count("1")
        yield f"clz.{k.name}", U32, (k,), lambda a, n=n: n - a.bit_length()
        yield f"brev.{k.name}", k, (k,), lambda a, n=n: int(f"{a:0{n}b}"[::-1], 2)
        yield (
            f"bfi.{k.name}",
            k,
            (k, k, U32, U32),
            lambda a, b, p, w, k=k: inserted(a, b, p, w, k),
        )
    for k in (U32, U64, S32, S64):
        yield f"bfind.{k.name}", U32, (k,), lambda a, k=k: found(a, k)
        yield (
            f"bfind.shiftamt.{k.name}",
            U32,
            (k,),
            lambda a, k=k: -1 if found(a, k) < 0 else k.bits - 1 - found(a, k),
        )
        yield f"bfe.{k.name}", k, (k, U32, U32), lambda a, p, w, k=k: extracted(a, p, w, k)
    for mode in ("clamp", "wrap"):
        wrap = mode == "wrap"
        yield f"bmsk.{mode}.b32", B32, (U32, U32), lambda p, w, m=wrap: mask(p, w, m)
        for k in (U32, S32):
            yield (
                f"szext.{mode}.{k.name}",
                k,
                (k, U32),
                lambda a, w, k=k, m=wrap: extended(a, w, k, m),
            )

        def by(n, wrap=wrap):
            return n % 32 if wrap else min(n, 32)

        yield (
            f"shf.l.{mode}.b32",
            B32,
            (B32, B32, U32),
            lambda a, b, n, by=by: (b << 32 | a) << by(n) >> 32,
        )
        yield (
            f"shf.r.{mode}.b32",
            B32,
            (B32, B32, U32),
            lambda a, b, n, by=by: (b << 32 | a) >> by(n),
        )
    for k in (B16, B32, B64):
        yield f"and.{k.name}", k, (k, k), lambda a, b: a & b
        yield f"or.{k.name}", k, (k, k), lambda a, b: a | b
        yield f"xor.{k.name}", k, (k, k), lambda a, b: a ^ b
        yield f"not.{k.name}", k, (k,), lambda a: ~a
        yield f"cnot.{k.name}", k, (k,), lambda a: int(a == 0)
        yield f"shl.{k.name}", k, (k, U32), lambda a, n: a << min(n, 64)
        yield f"shr.{k.name}", k, (k, U32), lambda a, n: a >> n


def dot_cases():
    def items(value, bits, kind):
        return [
            Kind(f"{kind.name[0]}{bits}").wrapped(value >> shift) for shift in range(0, 32, bits)
        ]

    for x, y in itertools.product((U32, S32), repeat=2):
        of = S32 if S32 in (x, y) else U32
        yield (
            f"dp4a.{x.name}.{y.name}",
            of,
            (B32, B32, of),
            lambda a, b, c, x=x, y=y: (
                c + sum(p * q for p, q in zip(items(a, 8, x), items(b, 8, y), strict=True))
            ),
        )
        for half, first in ("lo", 0), ("hi", 2):
            yield (
                f"dp2a.{half}.{x.name}.{y.name}",
                of,
                (B32, B32, of),
                lambda a, b, c, x=x, y=y, first=first: (
                    c
                    + sum(
                        p * q
                        for p, q in zip(
                            items(a, 16, x), items(b, 8, y)[first : first + 2], strict=True
                        )
                    )
                ),
            )


CASES = {opcode: case for opcode, *case in cases()}


@pytest.mark.parametrize("opcode", CASES)
def test_it_computes_what_integers_do(opcode):
    result, kinds, definition = CASES[opcode]
    columns = samples(*kinds)
    if opcode.split(".")[0] in ("div", "rem"):
        columns[1] = [b or 1 for b in columns[1]]
    inputs = arrays(kinds, columns)
    code = f"{opcode} %out, {', '.join(f'%{name}' for name in inputs)};"
    got = evaluate(code, {"out": result.dtype}, **inputs)["out"]
    expected = [result.wrapped(definition(*row)) for row in zip(*columns, strict=True)]
    assert got.tolist() == expected


def test_fns_finds_the_nth_bit_up_and_down():
    kinds = (B32, U32, S32)
    value, base, offset = samples(*kinds)
    base, offset = [b % 32 for b in base], [(o + 40) % 81 - 40 for o in offset]
    got = evaluate(
        "fns.b32 %out, %a, %b, %c;", {"out": np.int32}, **arrays(kinds, [value, base, offset])
    )
    expected = [nth_bit(*row) for row in zip(value, base, offset, strict=True)]
    assert got["out"].tolist() == expected
    with pytest.raises(Fault, match="starts at bit 32"):
        evaluate("fns.b32 %out, %a, 32, 1;", {"out": np.int32}, a=np.ones(1, np.uint32))


@pytest.mark.parametrize("first", range(0, 256, 16))
def test_lop3_is_its_table(first):
    a, b, c = samples(B32, B32, B32, seed=first)
    tables = range(first, first + 16)
    got = evaluate(
        "\n".join(f"lop3.b32 %t{t}, %a, %b, %c, {t};" for t in tables),
        {f"t{t}": np.uint32 for t in tables},
        **arrays((B32,) * 3, [a, b, c]),
    )
    for t in tables:
        expected = [
            from_bits(bit(t, bit(x, i) * 4 + bit(y, i) * 2 + bit(z, i)) for i in range(32))
            for x, y, z in zip(a, b, c, strict=True)
        ]
        assert got[f"t{t}"].tolist() == expected


@pytest.mark.parametrize("word", ["and", "or"])
def test_lop3_makes_a_predicate_of_its_result(word):
    a = np.array([0, 0, 6, 6] * 8, np.uint32)
    q = np.array([False, True] * 16)
    got = evaluate(
        f"lop3.{word}.b32 %d|%p, %a, %a, %a, 0x80, %q;"
        f" lop3.{word}.b32 _|%n, %a, %a, %a, 0x80, !%q;",
        {"d": np.uint32, "p": bool, "n": bool},
        a=a,
        q=q,
    )
    both = np.logical_and if word == "and" else np.logical_or
    assert got["d"].tolist() == a.tolist()
    assert got["p"].tolist() == both(a != 0, q).tolist()
    assert got["n"].tolist() == both(a != 0, ~q).tolist()


MODES = {  # bytes of the result, the highest first, for each value of the two lowest bits of c
    "f4e": ("3210", "4321", "5432", "6543"),
    "b4e": ("5670", "6701", "7012", "0123"),
    "rc8": ("0000", "1111", "2222", "3333"),
    "ecl": ("3210", "3211", "3222", "3333"),
    "ecr": ("0000", "1110", "2210", "3210"),
    "rc16": ("1010", "3232", "1010", "3232"),
}


@pytest.mark.parametrize("mode", MODES)
def test_prmt_by_mode(mode):
    a, b, c = samples(B32, B32, U32)
    got = evaluate(
        f"prmt.b32.{mode} %out, %a, %b, %c;", {"out": np.uint32}, **arrays((B32,) * 3, [a, b, c])
    )["out"]
    for x, y, z, found_ in zip(a, b, c, got.tolist(), strict=True):
        source = (y << 32 | x).to_bytes(8, "little")
        assert found_.to_bytes(4, "big") == bytes(source[int(n)] for n in MODES[mode][z & 3])


def test_prmt_by_numbers():
    a, b, c = samples(B32, B32, U32)
    got = evaluate(
        "prmt.b32 %out, %a, %b, %c;", {"out": np.uint32}, **arrays((B32,) * 3, [a, b, c])
    )["out"]
    for x, y, z, found_ in zip(a, b, c, got.tolist(), strict=True):
        source = (y << 32 | x).to_bytes(8, "little")
        numbers = [z >> 4 * i & 15 for i in range(4)]
        expected = [
            (0xFF if source[n & 7] & 0x80 else 0) if n & 8 else source[n & 7] for n in numbers
        ]
        assert list(found_.to_bytes(4, "little")) == expected


# ---- Extended precision


def limbs(values, kind, count):
    return [
        np.array([v >> i * kind.bits & (1 << kind.bits) - 1 for v in values], f"u{kind.bits // 8}")
        for i in range(count)
    ]


def joined(got, names, kind):
    return [
        sum(int(limb) << i * kind.bits for i, limb in enumerate(row))
        for row in zip(*(got[name].tolist() for name in names), strict=True)
    ]


@pytest.mark.parametrize("kind", [U32, S32, U64, S64], ids=lambda k: k.name)
@pytest.mark.parametrize("word", ["add", "sub"])
def test_carries_run_through_four_limbs(word, kind):
    limb = Kind(f"u{kind.bits}")
    a = [from_limbs(row, kind) for row in zip(*samples(*(limb,) * 4, seed=1), strict=True)]
    b = [from_limbs(row, kind) for row in zip(*samples(*(limb,) * 4, seed=2), strict=True)]
    # Carries that pass a limb of ones, borrows that pass a limb of zeros.
    a[:3], b[:3] = [(1 << kind.bits * 3) - 1, 0, 1 << kind.bits * 3], [1, 1, 1]
    inputs = {f"a{i}": limb for i, limb in enumerate(limbs(a, kind, 4))}
    inputs |= {f"b{i}": limb for i, limb in enumerate(limbs(b, kind, 4))}
    opcodes = [f"{word}.cc", f"{word}c.cc", f"{word}c.cc", f"{word}c"]
    code = "\n".join(
        f"{opcode}.{kind.name} %d{i}, %a{i}, %b{i};" for i, opcode in enumerate(opcodes)
    )
    names = [f"d{i}" for i in range(4)]
    got = evaluate(code, dict.fromkeys(names, f"u{kind.bits // 8}"), **inputs)
    modulus = 1 << 4 * kind.bits
    expected = [(x + y if word == "add" else x - y) % modulus for x, y in zip(a, b, strict=True)]
    assert joined(got, names, kind) == expected


def from_limbs(row, kind):
    return sum((limb % (1 << kind.bits)) << i * kind.bits for i, limb in enumerate(row))


@pytest.mark.parametrize("kind", [U32, U64], ids=lambda k: k.name)
def test_a_product_of_two_limbs_each(kind):
    t, (a0, a1, b0, b1) = kind.name, samples(*(kind,) * 4)
    # The ISA's own example of madc.
    code = f"""
    mul.lo.{t} %d0, %a0, %b0;       mul.hi.{t} %d1, %a0, %b0;
    mad.lo.cc.{t} %d1, %a1, %b0, %d1;  madc.hi.{t} %d2, %a1, %b0, 0;
    mad.lo.cc.{t} %d1, %a0, %b1, %d1;  madc.hi.cc.{t} %d2, %a0, %b1, %d2;
    addc.{t} %d3, 0, 0;
    mad.lo.cc.{t} %d2, %a1, %b1, %d2;  madc.hi.{t} %d3, %a1, %b1, %d3;
    """
    inputs = {
        name: np.array(v, kind.dtype)
        for name, v in {"a0": a0, "a1": a1, "b0": b0, "b1": b1}.items()
    }
    names = [f"d{i}" for i in range(4)]
    got = evaluate(code, dict.fromkeys(names, kind.dtype), **inputs)
    n = kind.bits
    expected = [(w | x << n) * (y | z << n) for w, x, y, z in zip(a0, a1, b0, b1, strict=True)]
    assert joined(got, names, kind) == expected


def test_madc_lo_takes_and_leaves_a_carry():
    a, b, c = (np.array(v, np.uint32) for v in ([3, 0xFFFFFFFF], [5, 1], [0xFFFFFFFF, 0]))
    got = evaluate(
        "add.cc.u32 %d, 0xffffffff, 1; madc.lo.cc.u32 %d, %a, %b, %c; addc.u32 %e, 0, 0;",
        {"d": np.uint32, "e": np.uint32},
        a=a,
        b=b,
        c=c,
    )
    assert got["d"].tolist() == [15, 0]
    assert got["e"].tolist() == [1, 1]


def test_the_carry_is_of_each_lane_and_of_those_that_execute():
    a = np.array([0xFFFFFFFF, 0] * 16, np.uint32)
    p = np.array([True, True, False, False] * 8)
    got = evaluate(
        "add.cc.u32 %d, %a, 1; @%p add.cc.u32 %d, 0, 0; addc.u32 %d, 0, 0;",
        {"d": np.uint32},
        a=a,
        p=p,
    )
    assert got["d"].tolist() == [0, 0, 1, 0] * 8


# ---- What has no value, and what isn't there

UNDEFINED = {
    "a register": "mov.b32 %d, %x;",
    "a sum": "add.s32 %d, %a, %x;",
    "a product by zero": "mul.lo.s32 %d, %x, 0;",
    "a quotient by zero": "sub.s32 %x, %a, %a; div.s32 %d, %a, %x;",
    "a remainder by zero": "sub.s32 %x, %a, %a; rem.s32 %d, %a, %x;",
    "an and with ones": "and.b32 %d, %x, -1;",
    "an or with zero": "or.b32 %d, 0, %x;",
    "a carry": "addc.u32 %d, %a, 0;",
    "a carry of what is undefined": "add.cc.u32 %x, %x, 1; addc.u32 %d, 0, 0;",
    "a byte": "prmt.b32 %d, %a, %x, 0x4210;",
    "a byte chosen by it": "prmt.b32 %d, %a, %a, %x;",
    "a table's column": "lop3.b32 %d, %x, %a, %a, 0xf0;",
    "a shift": "shl.b32 %d, %a, %x;",
}


@pytest.mark.parametrize("code", UNDEFINED.values(), ids=UNDEFINED)
def test_a_result_of_undefined_operands_can_not_be_stored(code):
    with pytest.raises(Fault, match="undefined"):
        evaluate(
            code, {"d": np.uint32}, registers=".reg .b32 %x;", a=np.arange(1, 33, dtype=np.uint32)
        )


DEFINED = {
    "and.b32 %d, %x, 0;": 0,
    "and.b32 %d, 0, %x;": 0,
    "or.b32 %d, -1, %x;": 0xFFFFFFFF,
    "prmt.b32 %d, 0x44332211, %x, 0x0123;": 0x11223344,
    "prmt.b32 %d, %x, 0x44332211, 0x7654;": 0x44332211,
    "lop3.b32 %d, 7, %x, 5, 0xf0;": 7,
    "lop3.b32 %d, %x, 7, %x, 0x33;": 0xFFFFFFF8,
    "lop3.b32 %d, 1, 2, %x, 0xfc;": 3,
}


@pytest.mark.parametrize("code", DEFINED)
def test_an_operand_that_does_not_matter_may_be_undefined(code):
    got = evaluate(code, {"d": np.uint32}, registers=".reg .b32 %x;", a=np.zeros(32, np.uint32))
    assert got["d"].tolist() == [DEFINED[code]] * 32


@pytest.mark.parametrize(
    "code",
    [
        "add.b32 %d, %a, %a;",
        "add.sat.u32 %d, %a, %a;",
        "add.s32.sat.wrap %d, %a, %a;",
        "add.s32 %d, %a;",
        "add.s64 %d, %a, %a;",
        "add.s32 %h, %a, %a;",
        "sub.u16x2 %d, %a, %a;",
        "mul.s32 %d, %a, %a;",
        "mul.wide.u64 %d, %a, %a;",
        "mad.lo.sat.s32 %d, %a, %a, %a;",
        "mad24.lo.sat.s32 %d, %a, %a, %a;",
        "min.relu.u32 %d, %a, %a;",
        "abs.u32 %d, %a;",
        "neg.s16x2 %d, %a;",
        "shl.s32 %d, %a, %a;",
        "shl.b32 %d, %a, %h;",
        "shf.l.b32 %d, %a, %a, %a;",
        "lop3.b32 %d, %a, %a, %a, 256;",
        "lop3.b32 %d, %a, %a, %a, %a;",
        "lop3.xor.b32 %d|%p, %a, %a, %a, 1, %p;",
        "and.u32 %d, %a, %a;",
        "cnot.pred %p, %p;",
        "popc.b16 %d, %h;",
        "prmt.b32.f5e %d, %a, %a, %a;",
        "dp4a.u32 %d, %a, %a, %a;",
        "dp2a.u32.u32 %d, %a, %a, %a;",
        "bfe.b32 %d, %a, %a, %a;",
        "addc.u16 %h, %h, %h;",
        "add.s32 %d, %p, %a;",
    ],
)
def test_what_is_not_there_is_refused(code):
    with pytest.raises(UnknownInstruction, match=code.split(" ")[0]):
        evaluate(
            code,
            {"d": np.uint32},
            registers=".reg .b16 %h; .reg .pred %p;",
            a=np.zeros(32, np.uint32),
        )
