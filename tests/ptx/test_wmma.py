"""wmma.load, wmma.mma, wmma.store against whole products: layouts in registers are the machine's own."""

import numpy as np
import pytest

from .launch import Fault, In, InOut, Machine, Out, UnknownInstruction
from .matrices import BITS, SUMS, aligned, assert_rounded, exact_sum, random_bits, values
from .snippets import evaluate, run

THREE = ((16, 16, 16), (32, 8, 16), (8, 32, 16))
CASES = [
    *((shape, "f16", c, d) for shape in THREE for c in ("f16", "f32") for d in ("f16", "f32")),
    *((shape, "bf16", "f32", "f32") for shape in THREE),
    *((shape, kind, "s32", "s32") for shape in THREE for kind in ("s8", "u8")),
    ((16, 16, 8), "tf32", "f32", "f32"),
    ((8, 8, 4), "f64", "f64", "f64"),
]
STORED = {
    "s8": np.int8,
    "u8": np.uint8,
    "bf16": np.uint16,
    "f16": np.uint16,
    "tf32": np.uint32,
    "f64": np.uint64,
}


def registers(shape: tuple[int, int, int], matrix: str, kind: str) -> int:
    """PTX ISA, "Matrix Fragments for WMMA"."""
    m, n, k = shape
    if kind == "f16" and matrix in "ab":
        return 8
    elements = {"a": m * k, "b": k * n, "c": m * n}[matrix]
    return max(elements * BITS[kind] // 32 // 32, 1) if kind != "f64" else elements // 32


def kernel(
    shape: tuple[int, int, int], kind: str, c: str, d: str, layouts: tuple[str, ...],
    strides: tuple[int, ...], modifiers: str = "", multiplied_as: tuple[str, str] | None = None,
) -> str:  # fmt: skip
    """D = A · B + C. ``layouts`` and ``strides`` are of A, B, C, D."""
    m, n, k = shape
    of = f"m{m}n{n}k{k}"
    width = 64 if kind == "f64" else 32
    counts = {x: registers(shape, x, kind) for x in "ab"}
    counts |= {"c": registers(shape, "c", c), "d": registers(shape, "c", d)}
    types = f"{d}.{c}" if kind == "f16" else f"{d}.{kind}.{kind}.{c}"
    a, b, c_vector, d_vector = (
        "{" + ", ".join(f"%{x}{i}" for i in range(counts[x])) + "}" for x in "abcd"
    )
    a_as, b_as = multiplied_as or layouts[:2]
    rnd = ".rn" if kind == "f64" else ""
    return f"""
.version 9.0
.target sm_90a
.address_size 64
.visible .entry product(.param .u64 a, .param .u64 b, .param .u64 c, .param .u64 d) {{
  .reg .b64 %pa, %pb, %pc, %pd;
  {" ".join(f".reg .b{width} %{x}<{count}>;" for x, count in counts.items())}
  ld.param.u64 %pa, [a]; ld.param.u64 %pb, [b]; ld.param.u64 %pc, [c]; ld.param.u64 %pd, [d];
  wmma.load.a.sync.aligned.{layouts[0]}.{of}.global.{kind} {a}, [%pa], {strides[0]};
  wmma.load.b.sync.aligned.{layouts[1]}.{of}.{kind} {b}, [%pb], {strides[1]};
  wmma.load.c.sync.aligned.{layouts[2]}.{of}.global.{c} {c_vector}, [%pc], {strides[2]};
  wmma.mma.sync.aligned.{a_as}.{b_as}.{of}{rnd}{modifiers}.{types}
    {d_vector}, {a}, {b}, {c_vector};
  wmma.store.d.sync.aligned.{layouts[3]}.{of}.global.{d} [%pd], {d_vector}, {strides[3]};
  ret;
}}
"""  # fmt: skip


def in_memory(matrix: np.ndarray, layout: str, extra: int) -> tuple[np.ndarray, int]:
    """A matrix as it lies in memory, and its stride, ``extra`` elements longer than need be."""
    lines = matrix if layout == "row" else matrix.T
    memory = np.zeros((lines.shape[0], lines.shape[1] + extra), matrix.dtype)
    memory[:, : lines.shape[1]] = lines
    return aligned(memory), memory.shape[1]


def from_memory(memory: np.ndarray, layout: str, columns: int) -> np.ndarray:
    lines = memory[:, :columns]
    return lines if layout == "row" else lines.T


@pytest.mark.parametrize(
    "layouts", ["row col row col", "col row col row", "row row row row", "col col col col"]
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, (*case[0], *case[1:]))))
def test_product(case: tuple, layouts: str) -> None:
    (m, n, k), kind, c_kind, d_kind = case
    layout = layouts.split()
    random = np.random.default_rng([m, n, k])
    a, b = random_bits(kind, (m, k), random).astype(STORED[kind]), random_bits(kind, (k, n), random)
    b = b.astype(STORED[kind])
    c = (100 * random.standard_normal((m, n))).astype(SUMS[c_kind])
    extra = 32 // a.itemsize
    of_a, of_b = in_memory(a, layout[0], extra), in_memory(b, layout[1], extra)
    of_c = in_memory(c, layout[2], 32 // c.itemsize)
    of_d = in_memory(
        np.zeros((m, n), SUMS[d_kind]), layout[3], 32 // np.dtype(SUMS[d_kind]).itemsize
    )
    text = kernel((m, n, k), kind, c_kind, d_kind, layout, (of_a[1], of_b[1], of_c[1], of_d[1]))
    arguments = [In("a", of_a[0]), In("b", of_b[0]), In("c", of_c[0]), InOut("d", of_d[0])]
    ran = run(text, (1,), (32,), arguments)
    found = from_memory(of_d[0], layout[3], n if layout[3] == "row" else m)
    bits_a, bits_b = (x.view(f"u{x.itemsize}") for x in (a, b))
    exact = exact_sum(values(kind, bits_a), values(kind, bits_b), c.astype(np.float64))
    if kind == "f64":
        np.testing.assert_allclose(found, exact, rtol=1e-14, atol=1e-14)
    else:
        assert_rounded(np.ascontiguousarray(found), exact, d_kind)
    assert sum(count.multiplies for count in ran.counts) == m * n * k


def ones(shape: tuple[int, int]) -> np.ndarray:
    return aligned(np.full(shape, 0x3F80, np.uint16))


def test_a_is_multiplied_as_it_was_loaded() -> None:
    random = np.random.default_rng(0)
    a = aligned(random_bits("bf16", (16, 16), random))
    c, d = aligned(np.zeros((16, 16), np.float32)), aligned(np.zeros((16, 16), np.float32))
    layouts = ("row", "col", "row", "row")
    for as_, right in ((("row", "col"), True), (("col", "col"), False), (("row", "row"), False)):
        text = kernel(
            (16, 16, 16), "bf16", "f32", "f32", layouts, (16, 16, 16, 16), multiplied_as=as_
        )
        run(text, (1,), (32,), [In("a", a), In("b", a), In("c", c), InOut("d", d)])
        exact = values("bf16", a) @ values("bf16", a).T
        assert np.allclose(d, exact, atol=1e-5) == right


def test_integer_sums_are_clamped_if_asked() -> None:
    a = aligned(np.full((16, 16), 127, np.int8))
    c = aligned(np.full((16, 16), 2**31 - 100, np.int32))
    for modifiers, expected in ((".satfinite", 2**31 - 1), ("", -(2**31) + 16 * 127**2 - 100)):
        d = aligned(np.zeros((16, 16), np.int32))
        text = kernel(
            (16, 16, 16), "s8", "s32", "s32", ("row", "col", "row", "row"), (16,) * 4, modifiers
        )
        run(text, (1,), (32,), [In("a", a), In("b", a), In("c", c), Out("d", d)])
        assert (d == expected).all()


def test_undefined_elements_reach_their_row_and_column() -> None:
    layouts, strides = ("row", "col", "row", "row"), (16,) * 4
    text = kernel((16, 16, 16), "bf16", "f32", "f32", layouts, strides)
    c, d = aligned(np.zeros((16, 16), np.float32)), aligned(np.zeros((16, 16), np.float32))
    for undefined in "abc":
        arguments = [Out("a", ones((16, 16))) if undefined == "a" else In("a", ones((16, 16))),
                     Out("b", ones((16, 16))) if undefined == "b" else In("b", ones((16, 16))),
                     Out("c", c) if undefined == "c" else In("c", c), Out("d", d)]  # fmt: skip
        with pytest.raises(Fault, match=r"wmma\.store.*stores an undefined value"):
            run(text, (1,), (32,), arguments)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("[%pa], 16", "[%pa+16], 16"), "where a fragment has 16 bytes|past the end"),
        (("[%pa], 16", "[%pa+2], 16"), "where a fragment has 16 bytes"),
        (("[%pa], 16", "[%pa], 20"), "where a fragment has 16 bytes"),
        (("[%pa], 16", "[%pa], 24"), "past the end of a"),
        (("[%pd], ", "[%pc], "), "an input"),
    ],
)
def test_faults(change: tuple[str, str], says: str) -> None:
    text = kernel((16, 16, 16), "bf16", "f32", "f32", ("row", "col", "row", "row"), (16,) * 4)
    c, d = aligned(np.zeros((16, 16), np.float32)), aligned(np.zeros((16, 16), np.float32))
    arguments = [In("a", ones((16, 16))), In("b", ones((16, 16))), In("c", c), Out("d", d)]
    with pytest.raises(Fault, match=says):
        run(text.replace(*change), (1,), (32,), arguments)


@pytest.mark.parametrize(
    "change",
    [
        (".row.m16n16k16.global.bf16", ".row.m16n16k8.global.bf16"),
        (".row.m16n16k16.global.bf16", ".row.m16n16k16.local.bf16"),
        (".row.m16n16k16.global.bf16", ".row.m8n8k32.global.s4"),
        (".row.m16n16k16.global.bf16", ".row.m8n8k128.global.b1"),
        ("m16n16k16.f32.bf16.bf16.f32", "m16n16k16.f32.bf16.f16.f32"),
        ("m16n16k16.f32.bf16.bf16.f32", "m8n8k128.s32.b1.b1.s32.xor.popc"),
        ("wmma.store.d", "wmma.store.c"),
        ("wmma.load.a", "wmma.load.a.fast"),
        ("{%a0, %a1, %a2, %a3}", "{%a0, %a1, %a2}"),
    ],
)  # fmt: skip
def test_refuses_what_it_does_not_have(change: tuple[str, str]) -> None:
    text = kernel((16, 16, 16), "bf16", "f32", "f32", ("row", "col", "row", "row"), (16,) * 4)
    c, d = aligned(np.zeros((16, 16), np.float32)), aligned(np.zeros((16, 16), np.float32))
    arguments = [In("a", ones((16, 16))), In("b", ones((16, 16))), In("c", c), Out("d", d)]
    assert change[0] in text
    with pytest.raises(UnknownInstruction, match="wmma"):
        run(text.replace(*change), (1,), (32,), arguments)


def test_places_beyond_the_elements_repeat_them() -> None:
    a = aligned(np.arange(256, dtype=np.uint16).reshape(16, 16))
    names = [f"d{i}" for i in range(8)]
    found = evaluate(
        "wmma.load.a.sync.aligned.row.m16n16k16.global.f16"
        f" {{{', '.join('%' + name for name in names)}}}, [%matrix];",
        dict.fromkeys(names, np.uint32),
        machine=(machine := Machine()),
        matrix=np.full(32, machine.region(In("a", a)), np.uint64),
    )
    halves = np.stack([found[name] for name in names]).view(np.uint16)
    np.testing.assert_array_equal(np.sort(halves, None), np.repeat(np.arange(256), 2))


def test_shared_memory() -> None:
    """A, by columns, from shared memory, and D into it and out again."""
    text = """
.version 9.0
.target sm_90a
.address_size 64
.visible .entry product(.param .u64 a, .param .u64 d) {
  .reg .b64 %pa, %pd, %at, %generic;
  .reg .b32 %t, %s, %to, %v<4>, %a<4>, %b<4>, %d<8>;
  .shared .align 128 .b8 smem[2048];
  ld.param.u64 %pa, [a]; ld.param.u64 %pd, [d];
  mov.u32 %t, %tid.x; mov.u32 %s, smem;
  mad.wide.u32 %at, %t, 16, %pa; mad.lo.u32 %to, %t, 16, %s;
  ld.global.v4.b32 {%v0, %v1, %v2, %v3}, [%at];
  st.shared.v4.b32 [%to], {%v0, %v1, %v2, %v3};
  bar.sync 0;
  wmma.load.a.sync.aligned.col.m16n16k16.shared.bf16 {%a0, %a1, %a2, %a3}, [smem], 16;
  mul.wide.u32 %generic, %s, 1; cvta.shared.u64 %generic, %generic;
  wmma.load.b.sync.aligned.row.m16n16k16.bf16 {%b0, %b1, %b2, %b3}, [%generic];
  wmma.mma.sync.aligned.col.row.m16n16k16.f32.bf16.bf16.f32 {%d0, %d1, %d2, %d3, %d4, %d5, %d6, %d7},
    {%a0, %a1, %a2, %a3}, {%b0, %b1, %b2, %b3}, {0, 0, 0, 0, 0, 0, 0, 0};
  wmma.store.d.sync.aligned.row.m16n16k16.shared.f32 [smem+1024],
    {%d0, %d1, %d2, %d3, %d4, %d5, %d6, %d7}, 16;
  bar.sync 0;
  mad.lo.u32 %to, %t, 32, %s; mad.wide.u32 %at, %t, 32, %pd;
  ld.shared.v4.b32 {%d0, %d1, %d2, %d3}, [%to+1024]; st.global.v4.b32 [%at], {%d0, %d1, %d2, %d3};
  ld.shared.v4.b32 {%d0, %d1, %d2, %d3}, [%to+1040]; st.global.v4.b32 [%at+16], {%d0, %d1, %d2, %d3};
  ret;
}
"""
    a = aligned(random_bits("bf16", (16, 16), np.random.default_rng(0)))
    d = aligned(np.zeros((16, 16), np.float32))
    ran = run(text, (1,), (32,), [In("a", a), Out("d", d)])
    whole = values("bf16", a)
    assert_rounded(d, exact_sum(whole.T, whole, np.zeros((16, 16))), "f32")
    counts = {
        c.opcode.split(".")[1]: c for c in ran.counts if c.opcode.startswith("wmma") and c.bytes
    }
    assert counts["store"].bytes == 1024
    assert counts["load"].wavefronts == 4  # 512 bytes in a row
    with pytest.raises(Fault, match=r"no __syncwarp between|no barrier between"):
        run(text.replace("bar.sync 0;", "", 1), (1,), (32,), [In("a", a), Out("d", d)])
