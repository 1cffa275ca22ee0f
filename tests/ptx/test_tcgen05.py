"""tcgen05.mma and .cp against NumPy: shapes, types, layouts; and what they refuse."""

from dataclasses import replace

import numpy as np
import pytest

from ptx.launch import Fault, In, Machine, Out, Program, UnknownInstruction
from ptx.snippets import run
from ptx.tensor_core import (
    BASE32,
    BY32,
    BY64,
    BY128,
    COMMIT,
    FENCE,
    LANES,
    NONE,
    READY,
    TYPES,
    WAIT,
    WIDTH,
    Image,
    Product,
    case,
    copy_to_shared,
    describe,
    kernel,
    laid_out,
    transfer,
)

SWIZZLES = {"none": NONE, "32": BY32, "64": BY64, "128": BY128}
LATE = ("late", "random", "soon")


def check(product):
    one = case(product)
    np.testing.assert_array_equal(one.run(), one.expected)


@pytest.mark.parametrize(
    ("m", "n"), [(128, 8), (128, 40), (128, 256), (64, 8), (64, 24), (64, 256)]
)
def test_shapes_of_d(m, n):
    check(Product(m=m, n=n))


def test_rows_of_64_in_the_upper_half_of_the_lanes():
    check(Product(m=64, n=24, lane=16))


@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("kind", TYPES)
def test_k_major(kind, swizzle):
    width = max(WIDTH[SWIZZLES[swizzle]], 32)
    k = 2 * width // TYPES[kind].size
    check(Product(m=64, n=48, k=k, a=kind, b=kind, swizzles=(SWIZZLES[swizzle],) * 2))


TRANSPOSED = {"a": (True, False), "b": (False, True), "both": (True, True)}


@pytest.mark.parametrize("which", TRANSPOSED)
@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "tf32"])
def test_mn_major(kind, swizzle, which):
    k = 128 // TYPES[kind].size
    swizzles = (SWIZZLES[swizzle],) * 2
    check(Product(n=128, k=k, a=kind, b=kind, swizzles=swizzles, transposed=TRANSPOSED[which]))


@pytest.mark.parametrize("which", TRANSPOSED)
def test_mn_major_of_tf32(which):
    swizzles = tuple(BASE32 if one else BY128 for one in TRANSPOSED[which])
    check(Product(128, 64, 32, "tf32", "tf32", swizzles, TRANSPOSED[which]))


def test_swizzles_of_a_and_b_differ():
    check(Product(n=16, swizzles=(BY128, BY32), transposed=(False, True)))


def test_two_types_of_8_bits():
    check(Product(a="e4m3", b="e5m2", k=128))


@pytest.mark.parametrize("kind", ["f16", "e4m3"])
def test_d_of_16_bits(kind):
    check(Product(a=kind, b=kind, half=True, swizzles=(BY64, BY64)))


@pytest.mark.parametrize("negated", [(True, False), (False, True), (True, True)])
def test_negated(negated):
    check(Product(negated=negated))


def test_without_input_d():
    check(Product(accumulates=False))


@pytest.mark.parametrize("kind", ["f16", "tf32"])
def test_input_d_scaled(kind):
    check(Product(a=kind, b=kind, k=TYPES[kind].depth, scale=3, swizzles=(BY32, BY32)))


def test_lanes_disabled():
    check(Product(disabled=(0xFFFFFFFF, 0, 0x0000F00F, 0x80000001)))


@pytest.mark.parametrize(
    ("kind", "m", "lane"), [("bf16", 128, 0), ("bf16", 64, 16), ("tf32", 64, 0), ("e5m2", 128, 0)]
)
def test_a_in_tensor_memory(kind, m, lane):
    k = 128 // TYPES[kind].size
    check(Product(m=m, a=kind, b=kind, k=k, lane=lane, a_in_tensor_memory=True))


def test_tf32_is_cut_off():
    rng = np.random.default_rng(3)
    one = case(
        Product(n=8, k=8, a="tf32", b="tf32", accumulates=False, swizzles=(BY32, BY32)),
        draw=lambda shape: rng.integers(0x3F800000, 0x40000000, shape, dtype=np.uint32),
    )
    np.testing.assert_array_equal(one.run(), one.expected.astype(np.float32))


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("seed", range(3))
def test_whenever_it_happens(late, seed):
    one = case(Product())
    np.testing.assert_array_equal(one.run(machine=Machine(seed=seed, late=late)), one.expected)


def test_multiplies_are_counted():
    one = case(Product())
    ran = run(one.text, (1,), (LANES,), one.arguments)
    assert sum(count.multiplies for count in ran.counts) == 128 * 32 * 64


COPIES = {
    "128x256b": (128, 32, lambda row: [row]),
    "4x256b": (4, 32, lambda row: [32 * row]),
    "128x128b": (128, 16, lambda row: [row]),
    "64x128b.warpx2::02_13": (64, 16, lambda row: [row, row + 64]),
    "64x128b.warpx2::01_23": (
        64,
        16,
        lambda row: [row + row // 32 * 32, row + row // 32 * 32 + 32],
    ),
    "32x128b.warpx4": (32, 16, lambda row: [row, row + 32, row + 64, row + 96]),
}


@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("shape", COPIES)
def test_copy(shape, swizzle):
    rows, size, lanes = COPIES[shape]
    mode = SWIZZLES[swizzle]
    rng = np.random.default_rng(11)
    # Rows as wide as the swizzle, of which the copy takes the first bytes.
    matrix = rng.integers(0, 256, (max(rows, 8), max(size, WIDTH[mode])), dtype=np.uint8)
    image = laid_out(matrix, mode, False, 32)
    before = rng.integers(0, 1 << 32, (LANES, 16), dtype=np.uint32)
    expected = before.copy()
    for row in range(rows):
        for lane in lanes(row):
            expected[lane, 4 : 4 + size // 4] = matrix[row, :size].view(np.uint32)
    body = [*copy_to_shared("a", image.data.size), FENCE, *transfer("st", "c", 16), READY]
    body += describe("%adesc", 0, image.descriptor(mode))
    body += [f"@%leads tcgen05.cp.cta_group::1.{shape} [%taddr + 4], %adesc;", COMMIT, WAIT]
    found = np.zeros_like(expected)
    text = kernel("acd", [*body, *transfer("ld", "d", 16)], image.data.size)
    run(text, (1,), (LANES,), [In("a", image.data), In("c", before), Out("d", found)])
    np.testing.assert_array_equal(found, expected)


def test_an_undefined_row_makes_a_row_undefined():
    one = case(Product())
    # Whoever copies the last of A's 16 KiB doesn't.
    text = one.text.replace("add.u32 %end, %at, 16384;", "add.u32 %end, %at, 16368;")
    assert text != one.text
    with pytest.raises(Fault, match=r"thread \(127, 0, 0\): st.global.*undefined"):
        one.run(text)


# ---- Two threads


FENCED = """
setp.eq.u32 %p, %tid, 32;
@%p tcgen05.mma.cta_group::1.kind::f16 [%taddr + 0], %adesc, %bdesc, %word, %enabled;
@%p tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%bar];
"""
BEFORE = "@%leads tcgen05.fence::before_thread_sync;"
AFTER = "tcgen05.fence::after_thread_sync;"


def twice(between):
    """A product of K = 16 that one thread begins and another one adds to."""
    one = case(Product(k=16, swizzles=(BY32, BY32)))
    return one, one.text.replace(COMMIT, f"{between}\n{FENCED}")


def test_products_of_two_threads_in_order():
    one, text = twice(f"{BEFORE} bar.sync 0; {AFTER}")
    before = one.arguments[2].array.view(np.float32).astype(np.float64)
    np.testing.assert_array_equal(one.run(text), 2 * one.expected - before)


@pytest.mark.parametrize("between", ["", "bar.sync 0;", f"{BEFORE} {AFTER}"])
def test_products_of_two_threads_out_of_order(between):
    one, text = twice(between)
    with pytest.raises(Fault, match=r"tcgen05\.mma in line .* may still be writing"):
        one.run(text)


def test_products_of_two_shapes_are_no_pipeline():
    one = case(Product(k=32, swizzles=(BY64, BY64)))
    at = one.text.rindex("@%leads tcgen05.mma")
    text = f"{one.text[:at]}mov.b32 %word, {replace(one.product, n=16).word};\n{one.text[at:]}"
    with pytest.raises(Fault, match=r"tcgen05\.mma in line .* may still be writing"):
        one.run(text)


RELAXED = WAIT.replace("parity", "parity.relaxed.cluster")


def test_a_relaxed_wait_and_a_fence():
    one = case(Product())
    text = one.text.replace(WAIT, f"{RELAXED} {AFTER}")
    np.testing.assert_array_equal(one.run(text), one.expected)
    with pytest.raises(Fault, match=r"no wait for its tcgen05\.commit"):
        one.run(one.text.replace(WAIT, RELAXED))


@pytest.mark.parametrize("late", LATE)
def test_a_commit_to_all_ctas_of_a_cluster(late):
    """Both CTAs multiply; each waits until both are done."""
    one = case(Product(n=8))
    multicast = COMMIT.replace(".b64 [%bar];", ".multicast::cluster.b64 [%bar], %both;")
    together = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    text = one.text.replace("b64 [%bar], 1;", "b64 [%bar], 2;").replace(
        READY, f"{READY}\n{together}"
    )
    text = text.replace(COMMIT, f".reg .b16 %both; mov.b16 %both, 3; {multicast}")
    text = text.replace("ret; }", f"{together} ret; }}")
    # Both write the same D, one after the other.
    text = text.replace(WAIT, f"{WAIT} .reg .b32 %rank; mov.u32 %rank, %cluster_ctarank;")
    first = "setp.ne.u32 %p, %rank, 0; @%p bra done;"
    at = text.index("ld.param.u64 %base, [d];")
    text = f"{text[:at]}{first}\n{text[at:].replace('bar.sync 0;', 'done: bar.sync 0;', 1)}"
    found = one.arguments[-1].array
    machine = Machine(seed=2, late=late)
    run(text, (2,), (LANES,), one.arguments, machine=machine, cluster=(2,))
    np.testing.assert_array_equal(found.view(np.float32), one.expected)


# ---- What is refused


DESCRIPTORS = {
    "a version": (1 << 46, "bits 46 to 48"),
    "a base offset": (1 << 49, "base offset"),
    "an absolute address": (1 << 52, "absolute leading dimension"),
    "a swizzle": (1 << 61, "no swizzling mode"),
    "reserved bits": (1 << 55, "reserved bits"),
}


@pytest.mark.parametrize("what", DESCRIPTORS)
def test_matrix_descriptor(what):
    bit, sentence = DESCRIPTORS[what]
    one = case(Product())
    right = Image(np.zeros(0), 0, 1024, ()).descriptor(BY128)
    with pytest.raises(Fault, match=sentence):
        one.run(one.text.replace(str(right), str(right ^ bit)))


def test_swizzles_of_transposed_elements():
    with pytest.raises(Fault, match="only 128 bytes by 32 is"):
        case(Product(a="tf32", b="tf32", k=32, transposed=(True, False))).run()
    with pytest.raises(Fault, match="128 bytes by 32, is for transposed elements of 32 bits"):
        case(Product(swizzles=(BASE32, BY128), transposed=(True, False))).run()


WORDS = {
    "sparse": (1 << 2, "sparse"),
    "saturating": (1 << 3, "saturates"),
    "a reserved bit": (1 << 23, "reserved bits"),
    "M": (1 << 24, "M is not 64 or 128"),
    "N": (4 << 17, "N is not 8 to 256"),
    "a type": (2 << 7, "type 3 of A or B"),
    "a shift": (1 << 30, r"tcgen05\.mma\.ws"),
}


@pytest.mark.parametrize("what", WORDS)
def test_instruction_descriptor(what):
    bit, sentence = WORDS[what]
    one = case(Product())
    right = one.product.word
    with pytest.raises(Fault, match=sentence):
        one.run(one.text.replace(f"%word, {right};", f"%word, {right ^ bit};"))


def test_lanes_of_d():
    one = case(Product())
    with pytest.raises(Fault, match="D in lane 16 of tensor memory, not 0"):
        one.run(one.text.replace("[%taddr + 0], %adesc", f"[%taddr + {16 << 16}], %adesc"))


MMA = "[%taddr], %adesc, %bdesc, %word, %p;"
REFUSED = [
    "tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [where], 32;",
    f"tcgen05.mma.cta_group::2.kind::f16 {MMA}",
    f"tcgen05.mma.cta_group::1.kind::i8 {MMA}",
    f"tcgen05.mma.cta_group::1.kind::mxf4.block_scale {MMA}",
    f"tcgen05.mma.sp.cta_group::1.kind::f16 {MMA}",
    f"tcgen05.mma.ws.cta_group::1.kind::f16 {MMA}",
    f"tcgen05.mma.cta_group::1.kind::f16.collector::a::use {MMA}",
    f"tcgen05.mma.cta_group::1.kind::f16.new {MMA}",
    "tcgen05.mma.cta_group::1.kind::f8f6f4 [%taddr], %adesc, %bdesc, %word, %p, 3;",
    "tcgen05.mma.cta_group::1.kind::f16 [%taddr], %adesc, %bdesc, %word, %p, 16;",
    "tcgen05.shift.cta_group::1.down [%taddr];",
    "tcgen05.cp.cta_group::1.128x256b.b8x16.b6x16_p32 [%taddr], %adesc;",
    "tcgen05.cp.cta_group::1.64x128b [%taddr], %adesc;",
    "tcgen05.ld.red.sync.aligned.32x32b.x2.min.u32 {%v0, %v1}, %v2, [%taddr];",
    "tcgen05.ld.sync.aligned.32x32b.x2.b32 {%v0}, [%taddr];",
    "tcgen05.ld.sync.aligned.16x256b.x64.b32 {%v0}, [%taddr];",
]


@pytest.mark.parametrize("instruction", REFUSED)
def test_refused(instruction):
    opcode = instruction.split(" ")[0].replace(".", r"\.")
    with pytest.raises(UnknownInstruction, match=opcode):
        Program.from_text(kernel("d", [instruction], 0), "product")
