"""ldmatrix, stmatrix and movmatrix against the matrices that lanes' rows make."""

import numpy as np
import pytest

from .launch import Fault, In, UnknownInstruction
from .snippets import evaluate, run

LANES, SIDE = 32, 8
REGISTERS = ".reg .b32 %s, %to, %from; .reg .b64 %wide, %generic;"


def fragment(matrix: np.ndarray) -> np.ndarray:
    """PTX ISA, "ldmatrix": lane T has elements 2 (T % 4) and the next of row T / 4."""
    pairs = [matrix[t // 4, 2 * (t % 4) : 2 * (t % 4) + 2] for t in range(LANES)]
    return np.ascontiguousarray(np.array(pairs, np.uint16)).view(np.uint32)[:, 0]


def names(prefix: str, count: int) -> str:
    return "{" + ", ".join(f"%{prefix}{i}" for i in range(count)) + "}"


def rows_in_memory(random: np.random.Generator, stride: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """32 rows of 8 elements, and the offset of each, in no order."""
    offsets = random.permutation(LANES).astype(np.uint32) * np.uint32(stride)
    return random.integers(0, 1 << 16, (LANES, SIDE)).astype(np.uint16), offsets


def load(
    code: str,
    rows: np.ndarray,
    offsets: np.ndarray,
    from_: np.ndarray,
    count: int,
    barrier: str = "bar.sync 0;",
) -> list[np.ndarray]:
    """Writes each row at its offset, and executes ``code``, which loads d0, d1 … from %from."""
    pieces = rows.view(np.uint32)
    found = evaluate(
        "mov.u32 %s, smem; add.u32 %to, %s, %at_row; add.u32 %from, %s, %from_row;"
        f"st.shared.v4.b32 [%to], {names('v', 4)}; {barrier} {code}",
        {f"d{i}": np.uint32 for i in range(count)}, registers=REGISTERS, shared=8192,
        at_row=offsets, from_row=from_.astype(np.uint32),
        **{f"v{i}": np.ascontiguousarray(pieces[:, i]) for i in range(4)},
    )  # fmt: skip
    return [found[f"d{i}"] for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("space", [".shared", ".shared::cta", ""])
def test_ldmatrix(count: int, transposed: bool, space: str) -> None:
    random = np.random.default_rng(count)
    rows, offsets = rows_in_memory(random, 48)
    wanted = random.permutation(LANES)
    from_ = offsets[wanted]
    from_[SIDE * count :] = 3  # an address that nobody uses, and that nobody could
    form = f"x{count}{'.trans' if transposed else ''}{space}"
    code = f"ldmatrix.sync.aligned.m8n8.{form}.b16 {names('d', count)}, "
    if space:
        code += "[%from];"
    else:
        code = f"mul.wide.u32 %wide, %from, 1; cvta.shared.u64 %generic, %wide; {code} [%generic];"
    found = load(code, rows, offsets, from_, count)
    for i in range(count):
        matrix = rows[wanted[SIDE * i : SIDE * (i + 1)]]
        np.testing.assert_array_equal(found[i], fragment(matrix.T if transposed else matrix))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix(count: int, transposed: bool) -> None:
    random = np.random.default_rng(count)
    rows, offsets = rows_in_memory(random, 32)
    inputs = {}
    for i in range(count):
        matrix = rows[SIDE * i : SIDE * (i + 1)]
        inputs[f"v{i}"] = fragment(matrix.T if transposed else matrix)
    form = f"x{count}{'.trans' if transposed else ''}"
    used = offsets.copy()
    used[SIDE * count :] = 3
    found = evaluate(
        "mov.u32 %s, smem; add.u32 %to, %s, %at_row; add.u32 %from, %s, %from_row;"
        f"stmatrix.sync.aligned.m8n8.{form}.shared.b16 [%to], {names('v', count)};"
        f"bar.sync 0; ld.shared.v4.b32 {names('d', 4)}, [%from];",
        {f"d{i}": np.uint32 for i in range(4)}, registers=REGISTERS, shared=8192, at_row=used,
        from_row=offsets[np.arange(LANES) % (SIDE * count)], **inputs,
    )  # fmt: skip
    stored = np.stack([found[f"d{i}"] for i in range(4)], 1).view(np.uint16)
    np.testing.assert_array_equal(stored, rows[np.arange(LANES) % (SIDE * count)])


def test_movmatrix() -> None:
    matrix = np.random.default_rng(0).integers(0, 1 << 16, (SIDE, SIDE)).astype(np.uint16)
    found = evaluate(
        "movmatrix.sync.aligned.m8n8.trans.b16 %d, %a;", {"d": np.uint32}, a=fragment(matrix)
    )["d"]
    np.testing.assert_array_equal(found, fragment(matrix.T))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda offsets: offsets + 8, "not a multiple of 16"),
        (lambda offsets: offsets + 8192, "reads 16 bytes at"),
        (lambda offsets: offsets + (1 << 24), "for an address in shared memory"),
    ],
)
def test_ldmatrix_checks_its_rows(change, says: str) -> None:
    rows, offsets = rows_in_memory(np.random.default_rng(0))
    code = f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {names('d', 4)}, [%from];"
    with pytest.raises(Fault, match=says):
        load(code, rows, offsets, change(offsets), 4)


def test_ldmatrix_needs_its_warp_to_have_met() -> None:
    rows, offsets = rows_in_memory(np.random.default_rng(0))
    code = f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {names('d', 4)}, [%from];"
    with pytest.raises(Fault, match="no __syncwarp between"):
        load(code, rows, offsets, offsets[::-1], 4, barrier="")


@pytest.mark.parametrize(("stride", "wavefronts"), [(16, 4), (48, 4), (32, 8), (128, 32), (144, 4)])
def test_counts_passes_over_the_banks(stride: int, wavefronts: int) -> None:
    text = f"""
.version 9.0
.target sm_90a
.address_size 64
.visible .entry rows(.param .u64 out) {{
  .reg .b32 %t, %s, %at, %d<4>;
  .shared .align 1024 .b8 smem[8192];
  mov.u32 %t, %tid.x; mov.u32 %s, smem;
  mad.lo.u32 %at, %t, {stride}, %s;
  stmatrix.sync.aligned.m8n8.x4.shared.b16 [%at], {{%t, %t, %t, %t}};
  bar.sync 0;
  ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%d0, %d1, %d2, %d3}}, [%at];
  ret;
}}
"""
    ran = run(text, (1,), (32,), [In("out", np.zeros(1, np.int32))])
    moved = [c for c in ran.counts if "matrix" in c.opcode]
    assert [(c.wavefronts, c.bytes) for c in moved] == [(wavefronts, 512)] * 2


@pytest.mark.parametrize("transposed", [False, True])
def test_only_elements_that_nobody_wrote_are_undefined(transposed: bool) -> None:
    rows, offsets = rows_in_memory(np.random.default_rng(0))
    # Of each row only the first six elements are written.
    code = f"""
      .reg .pred %has;
      mov.u32 %s, smem; add.u32 %to, %s, %at_row;
      st.shared.v2.b32 [%to], {{%v0, %v1}}; st.shared.b32 [%to+8], %v2;
      bar.sync 0;
      ldmatrix.sync.aligned.m8n8.x1{".trans" if transposed else ""}.shared.b16 {{%x}}, [%to];
      setp.ne.u32 %has, %wanted, 0;
      mov.b32 %d, 0;
      @%has mov.b32 %d, %x;
    """
    pieces = rows.view(np.uint32)
    lanes = np.arange(LANES)
    # Elements 6 and 7 of a row: the last lane of four; transposed, the last two rows of eight.
    defined = lanes // 4 < 6 if transposed else lanes % 4 < 3
    inputs = {f"v{i}": np.ascontiguousarray(pieces[:, i]) for i in range(3)}
    registers = REGISTERS + ".reg .b32 %x;"

    def of(wanted: np.ndarray) -> np.ndarray:
        return evaluate(
            code, {"d": np.uint32}, registers=registers, shared=8192, at_row=offsets,
            wanted=wanted.astype(np.uint32), **inputs,
        )["d"]  # fmt: skip

    matrix = rows[:SIDE].T if transposed else rows[:SIDE]
    np.testing.assert_array_equal(of(defined), np.where(defined, fragment(matrix), 0))
    for lane in lanes[~defined]:
        with pytest.raises(Fault, match="stores an undefined value"):
            of(lanes == lane)


@pytest.mark.parametrize(
    "code",
    [
        "ldmatrix.sync.aligned.m8n16.x1.shared.b8x16.b6x16_p32 {%d0}, [%from];",
        "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%d0, %d1}, [%from];",
        "ldmatrix.sync.aligned.m8n8.x3.shared.b16 {%d0, %d1, %d2}, [%from];",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%d0, %d1}, [%from];",
        "ldmatrix.sync.aligned.m8n8.x1.global.b16 {%d0}, [%from];",
        "ldmatrix.sync.m8n8.x1.shared.b16 {%d0}, [%from];",
        "stmatrix.sync.aligned.m16n8.x1.trans.shared.b8 [%from], {%v0};",
        "movmatrix.sync.aligned.m8n8.b16 %d0, %v0;",
    ],
)
def test_refuses_what_it_does_not_have(code: str) -> None:
    rows, offsets = rows_in_memory(np.random.default_rng(0))
    with pytest.raises(UnknownInstruction, match="matrix"):
        load(code, rows, offsets, offsets, 4)
