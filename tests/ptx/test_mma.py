"""mma.sync against sums over fragments that are laid out by the figures of the PTX ISA."""

import itertools

import numpy as np
import pytest

from .launch import Fault, In, Out, UnknownInstruction
from .matrices import (
    LANES,
    SUMS,
    assert_rounded,
    exact_sum,
    fragment_a,
    fragment_b,
    random_bits,
    values,
    words,
)
from .snippets import evaluate, run


def pairs(*kinds: str) -> list[tuple[str, str]]:
    return list(itertools.product(kinds, kinds))


CASES = [
    *((16, k, "f16", "f16", d) for k in (8, 16) for d in ("f16", "f32")),
    *((16, k, "bf16", "bf16", "f32") for k in (8, 16)),
    *((16, k, "tf32", "tf32", "f32") for k in (4, 8)),
    (8, 4, "f64", "f64", "f64"),
    *((16, k, "f64", "f64", "f64") for k in (4, 8, 16)),
    *((*mk, a, b, "s32") for mk in ((8, 16), (16, 16), (16, 32)) for a, b in pairs("s8", "u8")),
    *((*mk, a, b, "s32") for mk in ((8, 32), (16, 32), (16, 64)) for a, b in pairs("s4", "u4")),
    *((16, k, a, b, d) for k in (16, 32) for a, b in pairs("e4m3", "e5m2") for d in ("f32", "f16")),
]  # fmt: skip
SMALL_CASES = [
    (16, 32, a, b, "f32")
    for a in ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1")
    for b in ("e4m3", "e2m3", "e2m1")
]


def opcode(m: int, k: int, a: str, b: str, d: str, modifiers: str = "") -> str:
    return f"mma.sync.aligned.m{m}n8k{k}.row.col{modifiers}.{d}.{a}.{b}.{d}"


def sums(m: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of element i of a lane, [32, .] each: c2 and c3 are 8 below c0 and c1."""
    lanes, i = np.meshgrid(np.arange(LANES), np.arange(m // 4), indexing="ij")
    return (lanes >> 2) + 8 * (i >> 1), (lanes % 4) * 2 + (i & 1)


def registers_of_sums(kind: str, elements: np.ndarray) -> np.ndarray:
    if kind == "f16":
        return words("f16", elements.astype(np.float16).view(np.uint16))
    return elements.astype(SUMS[kind])


def multiply(code: str, m: int, d: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """D [M, 8] of registers of A and B, and of C [M, 8]."""
    rows, columns = sums(m)
    of_c = registers_of_sums(d, c[rows, columns])
    of = {"a": a, "b": b, "c": of_c}
    inputs = {
        f"{name}{i}": np.ascontiguousarray(part[:, i])
        for name, part in of.items()
        for i in range(part.shape[1])
    }
    of = {"d": of_c, **of}
    operands = ["{" + ", ".join(f"%{n}{i}" for i in range(of[n].shape[1])) + "}" for n in of]
    outputs = {f"d{i}": of_c.dtype.type for i in range(of_c.shape[1])}
    found = evaluate(f"{code} {', '.join(operands)};", outputs, **inputs)
    registers = np.stack([found[name] for name in outputs], 1)
    elements = registers.view(SUMS[d]).reshape(LANES, -1)
    result = np.zeros((m, 8), SUMS[d])
    result[rows, columns] = elements
    return result


def random_sums(d: str, m: int, random: np.random.Generator) -> np.ndarray:
    if d == "s32":
        return random.integers(-1000, 1000, (m, 8)).astype(np.int32)
    return random.standard_normal((m, 8)).astype(SUMS[d])


def check(m: int, k: int, a_kind: str, b_kind: str, d: str, modifiers: str = "") -> None:
    random = np.random.default_rng([m, k, len(a_kind), len(b_kind)])
    a, b = random_bits(a_kind, (m, k), random), random_bits(b_kind, (k, 8), random)
    c = random_sums(d, m, random)
    of_a, of_b = fragment_a(a_kind, a), fragment_b(b_kind, b, m)
    found = multiply(opcode(m, k, a_kind, b_kind, d, modifiers), m, d, of_a, of_b, c)
    expected = exact_sum(values(a_kind, a), values(b_kind, b), c.astype(np.float64))
    if d == "f64":  # products are rounded there
        np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-14)
    else:
        assert_rounded(found, expected, d)


@pytest.mark.parametrize("case", CASES, ids=lambda case: opcode(*case)[17:])
def test_product_of_fragments(case: tuple) -> None:
    check(*case)


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: "-".join(map(str, case)))
def test_product_of_small_floats(case: tuple) -> None:
    check(*case, modifiers=".kind::f8f6f4")


@pytest.mark.parametrize("satfinite", [False, True])
def test_integer_sums_wrap_or_are_clamped(satfinite: bool) -> None:
    a = np.full((16, 32), 127, np.uint8)
    b = np.where(np.arange(8) % 2, 0x81, 127).astype(np.uint8)[None, :].repeat(32, 0)  # ±127
    c = np.where(np.arange(8) % 2, -(2**31) + 5, 2**31 - 5).astype(np.int32)[None, :].repeat(16, 0)
    code = opcode(16, 32, "s8", "s8", "s32", ".satfinite" if satfinite else "")
    found = multiply(code, 16, "s32", fragment_a("s8", a), fragment_b("s8", b, 16), c)
    exact = c.astype(np.int64) + 32 * 127 * np.where(np.arange(8) % 2, -127, 127)
    expected = np.clip(exact, -(2**31), 2**31 - 1) if satfinite else exact.astype(np.int32)
    np.testing.assert_array_equal(found, expected)


def test_tf32_ignores_the_lower_bits() -> None:
    random = np.random.default_rng(1)
    a, b = random_bits("tf32", (16, 8), random), random_bits("tf32", (8, 8), random)
    c = np.zeros((16, 8), np.float32)
    code = opcode(16, 8, "tf32", "tf32", "f32")
    plain = multiply(code, 16, "f32", fragment_a("tf32", a), fragment_b("tf32", b, 16), c)
    noisy = multiply(
        code,
        16,
        "f32",
        fragment_a("tf32", a | np.uint32(0x1FFF)),
        fragment_b("tf32", b | np.uint32(0x1000), 16),
        c,
    )
    np.testing.assert_array_equal(noisy, plain)


def test_special_values_reach_their_row_and_column() -> None:
    random = np.random.default_rng(2)
    a, b = random_bits("bf16", (16, 16), random), random_bits("bf16", (16, 8), random)
    a[3, 5], b[7, 2] = 0x7F80, 0x7FC1  # an infinity and a NaN
    found = multiply(
        opcode(16, 16, "bf16", "bf16", "f32"),
        16,
        "f32",
        fragment_a("bf16", a),
        fragment_b("bf16", b, 16),
        np.zeros((16, 8)),
    )
    nan = np.zeros((16, 8), bool)
    nan[:, 2] = True
    np.testing.assert_array_equal(np.isnan(found), nan)
    assert np.isinf(np.delete(found[3], 2)).all()
    assert (found[nan].view(np.uint32) == 0x7FFFFFFF).all()


# One lane's register of A, B or C has no value: what of D can be stored.
_UNDEFINED = """
.version 9.0
.target sm_80
.address_size 64
.visible .entry undefined(.param .u64 out) {{
  .reg .b32 %t, %one, %a<4>, %b<2>, %c<4>, %d<4>;
  .reg .b64 %base, %at;
  .reg .pred %p, %q;
  mov.u32 %t, %tid.x;
  mov.b32 %one, 0x3f803f80;
  setp.ne.u32 %p, %t, 13;
  {without}
  mov.b32 %a0, %one; mov.b32 %a1, %one; mov.b32 %a2, %one; mov.b32 %a3, %one;
  mov.b32 %b0, %one; mov.b32 %b1, %one;
  mov.b32 %c0, 0; mov.b32 %c1, 0; mov.b32 %c2, 0; mov.b32 %c3, 0;
  mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
    {{%d0, %d1, %d2, %d3}}, {{%a0, %a1, %a2, %a3}}, {{%b0, %b1}}, {{%c0, %c1, %c2, %c3}};
  ld.param.u64 %base, [out];
  mad.wide.u32 %at, %t, 4, %base;
  setp.eq.u32 %q, %t, {lane};
  @%q st.global.b32 [%at], %d{i};
  ret;
}}
"""


@pytest.mark.parametrize("operand", ["a1", "b0", "c2"])
def test_undefined_inputs_make_undefined_sums(operand: str) -> None:
    group, t = 13 >> 2, 13 % 4
    rows, columns = sums(16)
    for lane in (0, 1, 13, 14, 6 * 4 + t, 29):
        for i in range(4):
            row, column = rows[lane, i], columns[lane, i]
            # a1 is of row 8 + group, b0 of column group, c2 that one sum alone.
            without = {"a1": row == 8 + group, "b0": column == group, "c2": lane == 13 and i == 2}[
                operand
            ]
            text = _UNDEFINED.format(without="", lane=lane, i=i)
            value = "0" if operand[0] == "c" else "%one"
            text = text.replace(
                f"mov.b32 %{operand}, {value};", f"@%p mov.b32 %{operand}, {value};"
            )
            out = np.zeros(32, np.float32)
            arguments = [In("out", out, read_only=False)]
            if without:
                with pytest.raises(Fault, match="stores an undefined value"):
                    run(text, (1,), (32,), arguments)
            else:
                run(text, (1,), (32,), arguments)
                assert out[lane] == 16


def test_counts_multiplies() -> None:
    out = np.zeros(32, np.float32)
    text = _UNDEFINED.format(without="", lane=0, i=0)
    ran = run(text, (1,), (96,), [In("out", out, read_only=False)])
    (count,) = (c for c in ran.counts if c.opcode.startswith("mma"))
    assert (count.issued, count.multiplies) == (3, 3 * 16 * 8 * 16)


def test_needs_a_whole_warp() -> None:
    text = _UNDEFINED.format(without="", lane=0, i=0)
    with pytest.raises(Fault, match="needs all 32 lanes"):
        run(text, (1,), (24,), [Out("out", np.zeros(32, np.float32))])
    divided = text.replace("{without}", "").replace("mma.sync", "@%p mma.sync")
    with pytest.raises(Fault, match="only some lanes"):
        run(divided, (1,), (32,), [Out("out", np.zeros(32, np.float32))])


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("mma.sp.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "sparse"),
        ("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32", "no such shape"),
        ("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.xor.popc", "no type b1"),
        ("mma.sync.aligned.m16n8k16.col.row.f32.bf16.bf16.f32", "by rows"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.f16.f32", "no such shape"),
        ("mma.sync.aligned.m16n8k16.row.col.f16.bf16.bf16.f16", "no such shape"),
        ("mma.sync.aligned.m16n8k16.row.col.satfinite.f32.bf16.bf16.f32", "no such shape"),
        ("mma.sync.aligned.m16n8k32.row.col.block_scale.f32.e4m3.e4m3.f32.ue8m0", "block scales"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32.fast", "fast"),
        ("mma.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "sync"),
    ],
)  # fmt: skip
def test_refuses_by_name(code: str, says: str) -> None:
    text = _UNDEFINED.format(without="", lane=0, i=0)
    text = text.replace("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", code)
    with pytest.raises(UnknownInstruction, match=says):
        run(text, (1,), (32,), [Out("out", np.zeros(32, np.float32))])


def test_refuses_fragments_of_another_size() -> None:
    text = _UNDEFINED.format(without="", lane=0, i=0).replace("{%b0, %b1}", "{%b0}")
    with pytest.raises(UnknownInstruction, match="B takes 2 registers"):
        run(text, (1,), (32,), [Out("out", np.zeros(32, np.float32))])
