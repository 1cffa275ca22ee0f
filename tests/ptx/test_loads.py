"""Loads and stores of every state space, against NumPy's views of the same bytes."""

import itertools
import re

import numpy as np
import pytest

from ptx import Fault, In, InOut, Out, UnknownInstruction
from ptx.handwritten import fills, kernel, launch, numbers
from ptx.snippets import run

TYPES = {
    "b8": "u1",
    "u8": "u1",
    "s8": "i1",
    "b16": "u2",
    "u16": "u2",
    "s16": "i2",
    "b32": "u4",
    "u32": "u4",
    "s32": "i4",
    "f32": "u4",
    "b64": "u8",
    "u64": "u8",
    "s64": "i8",
    "f64": "u8",
}
REGISTERS = {"%h": 16, "%r": 32, "%q": 64}
BYTES, THREADS = 512, 128

# How a thread comes to its element of so many bytes, in %q9, when smem and its own memory hold x.
SPACES = {
    "global": "mad.wide.u32 %q9, %tid, {size}, %x;",
    "shared": "cvt.u64.u32 %q9, %tid; mov.u64 %q8, smem; mad.lo.u64 %q9, %q9, {size}, %q8;",
    "local": "mov.u64 %q9, own;",
    "const": "mov.u64 %q8, table; mad.wide.u32 %q9, %tid, {size}, %q8;",
    "param": "mov.u64 %q8, p_bytes; mad.wide.u32 %q9, %tid, {size}, %q8;",
}
CVTA = {"global": "", "const": "", "param": "cvta.param.u64 %q9, %q9;"}
CVTA |= {space: f"cvta.{space}.u64 %q9, %q9;" for space in ("shared", "local")}


def elements(size):
    return min(BYTES // size, THREADS)


def everywhere(body, data, space, size, result):
    """Runs a body that finds bytes ``[t·size, (t+1)·size)`` of ``data`` at %q9 in thread t."""
    threads = elements(size)
    table = ", ".join(map(str, data.view(np.uint8)))
    copy = "".join(
        f"ld.global.b8 %h9, [%q10+{i}]; st.local.b8 [own+{i}], %h9;" for i in range(size)
    )
    text = f"""
        .version 8.8 .target sm_90a .address_size 64
        .const .align 32 .b8 table[{BYTES}] = {{{table}}};
        .visible .entry kernel(
            .param .u64 p_x, .param .u64 p_y, .param .align 16 .b8 p_bytes[{BYTES}]) {{
        .reg .pred %p<16>; .reg .b16 %h<16>; .reg .b32 %r<32>; .reg .b64 %q<32>; .reg .b128 %o<4>;
        .reg .b32 %tid; .reg .b64 %x, %y;
        .shared .align 32 .b8 smem[{BYTES}];
        .local .align 32 .b8 own[32];
        ld.param.u64 %x, [p_x]; ld.param.u64 %y, [p_y];
        mov.u32 %tid, %tid.x;
        {fills("x", 0, BYTES)}
        bar.sync 0;
        setp.ge.u32 %p1, %tid, {threads};
        @%p1 ret;
        mad.wide.u32 %q10, %tid, {size}, %x;
        {copy}
        {SPACES[space].format(size=size)}
        {body}
        ret; }}"""
    run(text, (1,), (THREADS,), [In("x", data), Out("y", result), data.tobytes()])


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("generic", [False, True], ids=["", "generic"])
def test_a_load_extends_to_its_register(space, generic):
    data = numbers(BYTES, np.uint8)
    for kind, dtype in TYPES.items():
        size = int(dtype[1])
        threads = elements(size)
        for register, bits in REGISTERS.items():
            if bits < 8 * size:
                continue
            y = np.zeros(threads, f"u{bits // 8}")
            where = "" if generic else f".{space}"
            body = f"""{CVTA[space] if generic else ""}
                ld{where}.{kind} {register}1, [%q9];
                mad.wide.u32 %q9, %tid, {bits // 8}, %y;
                st.global.b{bits} [%q9], {register}1;"""
            everywhere(body, data, space, size, y)
            expected = data.view(dtype)[:threads].astype(f"{dtype[0]}{bits // 8}").view(y.dtype)
            np.testing.assert_array_equal(y, expected, err_msg=f"ld{where}.{kind} {register}")


def braces(register, first, count):
    return "{" + ", ".join(f"{register}{first + i}" for i in range(count)) + "}"


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_a_vector_is_its_elements_in_order(space, count, bits):
    if bits * count > 128:
        pytest.skip("wider than 128 bits")
    register = {8: "%h", 16: "%h", 32: "%r", 64: "%q"}[bits]
    size = bits * count // 8
    data = numbers(BYTES, np.uint8)
    threads = elements(size)
    y = np.zeros(threads * count, f"u{bits // 8}")
    # Reversed on the way, so that a vector store is seen too.
    reversed_ = "{" + ", ".join(f"{register}{10 + count - 1 - i}" for i in range(count)) + "}"
    everywhere(
        f"""ld.{space}.v{count}.b{bits} {braces(register, 10, count)}, [%q9];
            mad.wide.u32 %q9, %tid, {size}, %y;
            st.global.v{count}.u{bits} [%q9], {reversed_};""",
        data,
        space,
        size,
        y,
    )
    expected = data.view(y.dtype)[: threads * count].reshape(threads, count)[:, ::-1]
    np.testing.assert_array_equal(y.reshape(threads, count), expected)


@pytest.mark.parametrize("space", SPACES)
def test_128_bits(space):
    data = numbers(BYTES, np.uint8)
    y = np.zeros(BYTES, np.uint8)
    everywhere(
        f"ld.{space}.b128 %o1, [%q9]; mad.wide.u32 %q9, %tid, 16, %y; st.global.b128 [%q9], %o1;",
        data,
        space,
        16,
        y,
    )
    np.testing.assert_array_equal(y, data)


def test_256_bits_and_elements_left_out():
    data, y = numbers(BYTES, np.uint8), numbers(BYTES, np.uint8)
    y[:] = 7
    text = kernel(
        """mad.wide.u32 %q1, %tid, 32, %x; mad.wide.u32 %q2, %tid, 32, %y;
        setp.lt.u32 %p1, %tid, 8;
        @%p1 ld.global.L1::evict_last.L2::evict_first.v8.b32
            {%r0, %r1, _, %r3, %r4, %r5, %r6, %r7}, [%q1];
        @%p1 st.global.v8.b32 [%q2], {%r7, %r6, %r5, %r4, _, %r3, %r1, %r0};
        @%p1 bra END;
        ld.global.v4.b64 {%q3, _, %q5, %q6}, [%q1];
        st.global.v4.b64 [%q2], {%q6, %q5, _, %q3};
        END:""",
        "x y",
    )
    launch(text, [In("x", data), InOut("y", y)], threads=16)
    words = data[:256].view(np.uint32).reshape(8, 8)
    expected = words[:, [7, 6, 5, 4, 0, 3, 1, 0]]
    expected[:, 4] = 0x07070707
    np.testing.assert_array_equal(y[:256].view(np.uint32).reshape(8, 8), expected)
    doubles = data[256:].view(np.uint64).reshape(8, 4)
    expected = doubles[:, [3, 2, 0, 0]]
    expected[:, 2] = 0x0707070707070707
    np.testing.assert_array_equal(y[256:].view(np.uint64).reshape(8, 4), expected)


def test_what_is_left_out_is_not_read():
    # Nobody has written the second word.
    x, y = np.zeros(2, np.uint32), np.zeros(1, np.uint32)
    text = kernel(
        """mov.u32 %r1, 5; st.global.b32 [%x], %r1;
        ld.global.v2.b32 {%r2, _}, [%x]; st.global.b32 [%y], %r2;
        ld.global.v2.b32 {%r3, %r4}, [%x]; st.global.b32 [%y], %r3;
        st.global.b32 [%x+4], %r3;""",
        "x y",
    )
    launch(text, [Out("x", x), Out("y", y)], threads=1)
    assert y[0] == 5


@pytest.mark.parametrize("space", ["global", "shared", "local"])
@pytest.mark.parametrize("generic", [False, True], ids=["", "generic"])
def test_a_store_takes_the_low_bits(space, generic):
    # Bytes, halves and words of wide registers, beside each other in one place of 8 bytes.
    x, y = numbers(64, np.uint64), np.zeros(64, np.uint64)
    where = "" if generic else f".{space}"
    place = {
        "global": "mad.wide.u32 %q9, %tid, 8, %y;",
        "shared": "mov.u64 %q9, smem; mad.wide.u32 %q9, %tid, 8, %q9;",
        "local": "mov.u64 %q9, own;",
    }[space]
    text = kernel(
        f"""mad.wide.u32 %q1, %tid, 8, %x; mad.wide.u32 %q2, %tid, 8, %y;
        ld.global.b64 %q3, [%q1]; cvt.u32.u64 %r3, %q3; cvt.u16.u32 %h3, %r3;
        {place} {CVTA[space] if generic else ""}
        st{where}.b32 [%q9+4], %q3;
        st{where}.b16 [%q9+2], %r3;
        st{where}.b8 [%q9], %h3;
        st{where}.u8 [%q9+1], 255;
        ld{where}.b64 %q4, [%q9];
        st.global.b64 [%q2], %q4;""",
        "x y",
        registers=".local .align 8 .b8 own[8];",
    )
    launch(text, [In("x", x), Out("y", y)])
    b = x.view(np.uint8).reshape(64, 8)
    expected = np.stack(
        [b[:, 0], np.full(64, 255), b[:, 0], b[:, 1], b[:, 0], b[:, 1], b[:, 2], b[:, 3]], axis=1
    )
    np.testing.assert_array_equal(y.view(np.uint8).reshape(64, 8), expected)


def test_lanes_have_local_memory_of_their_own():
    y = np.zeros(64, np.uint32)
    text = kernel(
        """st.local.u32 [own+4], %tid; bar.sync 0;
        ld.local.u32 %r1, [own+4]; mad.wide.u32 %q1, %tid, 4, %y; st.global.u32 [%q1], %r1;""",
        "y",
        registers=".local .align 8 .b8 own[8];",
    )
    launch(text, [Out("y", y)])
    assert y.tolist() == list(range(64))


def test_parameters_of_calls():
    # A structure of 12 bytes and a word go in, a structure comes back; one function hands its own on.
    text = """
        .version 8.8 .target sm_90a .address_size 64
        .func (.param .align 4 .b8 out[8]) inner(.param .align 4 .b8 a[12], .param .b32 b) {
            .reg .b32 %r<8>; .reg .b64 %q<3>;
            ld.param.u32 %r1, [a+8]; ld.param.u32 %r2, [b]; ld.param.u16 %r3, [a+2];
            sub.u32 %r4, %r1, %r2;
            st.param.u32 [out], %r4; st.param.v2.b16 [out+4], {%r3, %r3};
            ret; }
        .func (.param .align 4 .b8 out[8]) outer(.param .align 4 .b8 a[12]) {
            .reg .b32 %r<8>;
            ld.param.u32 %r1, [a];
            { .param .b32 one; st.param.b32 [one], %r1;
              .param .align 4 .b8 got[8];
              call (got), inner, (a, one);
              ld.param.b32 %r2, [got]; ld.param.b32 %r3, [got+4]; }
            st.param.v2.b32 [out], {%r3, %r2};
            ret; }
        .visible .entry kernel(.param .u64 p_x, .param .u64 p_y) {
            .reg .b32 %r<8>; .reg .b64 %q<8>;
            mov.u32 %r0, %tid.x; ld.param.u64 %q0, [p_x]; ld.param.u64 %q1, [p_y];
            mad.wide.u32 %q0, %r0, 12, %q0; mad.wide.u32 %q1, %r0, 8, %q1;
            ld.global.b32 %r1, [%q0]; ld.global.b32 %r2, [%q0+4]; ld.global.b32 %r3, [%q0+8];
            { .param .align 4 .b8 s[12];
              st.param.b32 [s], %r1; st.param.b32 [s+4], %r2; st.param.b32 [s+8], %r3;
              .param .align 4 .b8 got[8];
              call (got), outer, (s);
              ld.param.v2.b32 {%r4, %r5}, [got]; }
            st.global.v2.b32 [%q1], {%r4, %r5};
            ret; }"""
    x, y = numbers(64 * 3), np.zeros((64, 2), np.uint32)
    run(text, (1,), (64,), [In("x", x), Out("y", y)])
    x = x.reshape(64, 3)
    half = x[:, 0] >> 16
    np.testing.assert_array_equal(y, np.stack([half | half << 16, x[:, 2] - x[:, 0]], axis=1))


# ---- Values that aren't there


def undefined(body, **options):
    y = np.zeros(64, np.uint32)
    launch(kernel(body, "y", **options), [Out("y", y)])
    return y


def test_local_memory_carries_what_has_no_value():
    # A structure of which half is set is copied as a whole, as compilers do.
    y = undefined(
        """st.local.u32 [own], %tid;
        ld.local.v2.u32 {%r1, %r2}, [own]; st.local.v2.u32 [own+8], {%r1, %r2};
        ld.local.u32 %r3, [own+8]; mad.wide.u32 %q1, %tid, 4, %y; st.global.u32 [%q1], %r3;""",
        registers=".local .align 8 .b8 own[16];",
    )
    assert y.tolist() == list(range(64))


UNDEFINED = {
    "a register": ("mov.u32 %r2, %r1;", "stores an undefined value"),
    "shared memory": ("ld.shared.u32 %r2, [smem+4];", "stores an undefined value"),
    "shared memory that has lost its value in part": (
        "mov.u16 %h1, 1; st.shared.u16 [smem], %h1; bar.sync 0; ld.shared.u32 %r2, [smem];",
        "stores an undefined value",
    ),
    "local memory": ("ld.local.u32 %r2, [own];", "stores an undefined value"),
    "an output": ("ld.global.u32 %r2, [%y];", "stores an undefined value"),
    "an address": ("ld.global.u32 %r2, [%q5];", "undefined value for an address"),
    "an address of shared memory": ("st.shared.u32 [%r5], %tid;", "undefined value for an address"),
}


@pytest.mark.parametrize("what", UNDEFINED)
def test_an_undefined_value_is_not_stored(what):
    code, message = UNDEFINED[what]
    if "in part" in what:
        code = (
            "setp.eq.u32 %p1, %tid, 0; @!%p1 bra OVER;"
            + code.replace("bar.sync 0;", "")
            + "OVER: mov.u32 %r9, 0;"
        )
    body = f"{code} mad.wide.u32 %q1, %tid, 4, %y; st.global.u32 [%q1], %r2;"
    with pytest.raises(Fault, match=message):
        undefined(body, registers=".local .align 8 .b8 own[16];")


def test_a_fault_names_kernel_line_cta_thread_and_element():
    y = np.zeros((4, 8), np.float32)
    text = kernel(
        """setp.eq.u32 %p1, %tid, 37;
        mov.u32 %r2, %ctaid.x; setp.eq.u32 %p2, %r2, 1; and.pred %p1, %p1, %p2;
        @%p1 ld.global.u32 %r1, [%y+52];
        @%p1 st.global.u32 [%y], %r1;""",
        "y",
    )
    with pytest.raises(Fault) as caught:
        launch(text, [Out("y", y)], grid=2)
    message = str(caught.value)
    line = 1 + text.split("\n").index("        @%p1 st.global.u32 [%y], %r1;")
    assert f"kernel: line {line}: CTA (1, 0, 0), thread (37, 0, 0): st.global.u32" in message
    assert "[%y], %r1" in message


# ---- Bounds, alignment, inputs


PLACES = {
    "past the end": (
        "ld.global.u32 %r1, [%x+256];",
        "reads 4 bytes at .*: 4 bytes past the end of x",
    ),
    "half past the end": ("ld.global.v2.u32 {%r1, %r2}, [%x+256];", "8 bytes past the end of x"),
    "before": ("ld.global.u32 %r1, [%x+-4];", "4 bytes before x"),
    "null": ("mov.u64 %q1, 0; ld.global.u32 %r1, [%q1];", "reads 4 bytes at 0: a null pointer"),
    "nowhere": ("mov.u64 %q1, 4096; st.u32 [%q1], %tid;", "stores 4 bytes at 0x1000: no tensor"),
    "misaligned": (
        "ld.global.u32 %r1, [%x+30];",
        r"reads 4 bytes at x\[0, 7\], whose address is not a multiple of 4",
    ),
    "a misaligned vector": (
        "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%x+40];",
        r"x\[1, 2\].* not a multiple of 16",
    ),
    "a misaligned vector with a gap": ("ld.global.v2.u32 {%r1, _}, [%x+4];", "not a multiple"),
    "a misaligned vector in order": (
        "ld.relaxed.gpu.global.v2.u32 {%r1, %r2}, [%x+4];",
        "not a multiple",
    ),
    "an input": ("st.global.u32 [%x+36], %tid;", r"stores to x\[1, 1\], an input"),
    "an input, in order": ("st.relaxed.gpu.global.u32 [%x+36], %tid;", r"x\[1, 1\], an input"),
    "shared memory past its end": (
        "ld.shared.u32 %r1, [smem+4096];",
        "reads 4 bytes at 4096 of shared memory, which has 4096",
    ),
    "shared memory before its start": (
        "mov.u32 %r1, smem; st.shared.u32 [%r1+-4], %tid;",
        "writes 4 bytes at -4 of shared memory",
    ),
    "shared memory misaligned": (
        "st.shared.u16 [smem+1], %tid;",
        "shared memory at 1, not a multiple of 2",
    ),
    "shared memory of nobody": (
        "mov.u32 %r1, 0x3000000; ld.shared::cluster.u32 %r2, [%r1];",
        "0x3000000 for an address in shared memory",
    ),
    "local memory past its end": (
        "st.local.u32 [own+14], %tid;",
        "stores 4 bytes at 14 of local memory, of 16 bytes",
    ),
    "local memory misaligned": (
        "st.local.u32 [own+2], %tid;",
        "at 2 of local memory, not a multiple of 4",
    ),
    "local memory before its start": ("ld.local.u32 %r1, [own+-4];", "at -4 of local memory"),
    "parameters past their end": (
        "ld.param.u32 %r1, [p_x+16];",
        "reads 4 bytes at 16 of the kernel's parameters, of 16 bytes",
    ),
    "parameters written": (
        "mov.b64 %q1, p_x; cvta.param.u64 %q1, %q1; st.u32 [%q1], %tid;",
        "stores to the kernel's parameters",
    ),
    "local memory in order": (
        "mov.u64 %q1, own; cvta.local.u64 %q1, %q1; st.release.gpu.u32 [%q1], %tid;",
        "in memory of one thread",
    ),
}


@pytest.mark.parametrize("what", PLACES)
def test_a_place_that_is_not_for_it(what):
    code, message = PLACES[what]
    x, y = np.zeros((8, 8), np.float32), np.zeros(1, np.uint32)
    text = kernel(code, "x y", registers=".local .align 16 .b8 own[16];")
    with pytest.raises(Fault, match=message):
        launch(text, [In("x", x), Out("y", y)], threads=1)


def test_an_index_is_that_of_strides():
    x = np.zeros((4, 16), np.float16)[:, ::4]
    text = kernel("ld.global.u32 %r1, [%x+74];", "x")
    with pytest.raises(Fault, match=re.escape("x[2, 1]")):
        launch(text, [In("x", x)], threads=1)


def test_lanes_may_not_store_different_values_to_one_place():
    def stores(value):
        y = np.zeros(40, np.uint32)
        text = kernel(
            f"""and.b32 %r1, %tid, 15; mad.wide.u32 %q1, %r1, 4, %y;
            {value} st.global.u32 [%q1], %r2;""",
            "y",
        )
        launch(text, [InOut("y", y)], threads=32)
        return y

    assert stores("mov.u32 %r2, %r1;")[:16].tolist() == list(range(16))
    with pytest.raises(Fault, match=r"stores to y\[0\] what lane 0 of the same warp stores other"):
        stores("mov.u32 %r2, %tid;")


def test_read_only_loads_promise_that_nobody_stores():
    text = """setp.eq.u32 %p1, %tid, 0; @%p1 st.global.u32 [%y], %tid; bar.sync 0;
        ld.global.nc.L1::no_allocate.L2::128B.u32 %r1, [%y];"""
    with pytest.raises(Fault, match=r"reads y\[0\] as read-only memory, which line \d+ stores to"):
        launch(kernel(text, "y"), [InOut("y", np.zeros(4, np.uint32))])
    y = np.zeros(4, np.uint32)
    launch(kernel(text.replace("%r1, [%y]", "%r1, [%y+4]"), "y"), [InOut("y", y)])


def test_ldu_is_for_one_address_a_warp():
    x, y = numbers(64), np.zeros(64, np.uint32)
    code = """mad.wide.u32 %q1, {}, 4, %x; ldu.global.u32 %r1, [%q1];
        mad.wide.u32 %q2, %tid, 4, %y; st.global.u32 [%q2], %r1;"""
    launch(kernel(code.format("%warp"), "x y"), [In("x", x), Out("y", y)])
    np.testing.assert_array_equal(y, np.repeat(x[:2], 32))
    with pytest.raises(Fault, match="another address in this lane"):
        launch(kernel(code.format("%tid"), "x y"), [In("x", x), Out("y", y)])


def test_discarded_memory_has_no_value():
    code = """setp.eq.u32 %p1, %tid, 0; @!%p1 bra END;
        discard.global.L2 [%x], 128; {} ld.global.u32 %r1, [%x+124]; st.global.u32 [%x+128], %r1; END:"""
    x = numbers(64)
    launch(kernel(code.format("st.global.u32 [%x+124], 7;"), "x"), [InOut("x", x)])
    assert x[31:33].tolist() == [7, 7]
    with pytest.raises(Fault, match="undefined value"):
        launch(kernel(code.format(""), "x"), [InOut("x", x)])


# ---- Words


REFUSED = """
    ld.global.u32 %r1, %r2
    ld.global.u24 %r1, [%q1]
    ld.global %r1, [%q1]
    ld.global.u32.twice %r1, [%q1]
    ld.global.shared.u32 %r1, [%q1]
    ld.texture.u32 %r1, [%q1]
    ld.global.u32 %h1, [%q1]
    ld.global.u32 %p1, [%q1]
    ld.global.u32 5, [%q1]
    ld.global.v2.u32 %r1, [%q1]
    ld.global.v2.u32 {%r1, %r2, %r3}, [%q1]
    ld.global.u32 {%r1, %r2}, [%q1]
    ld.global.v3.u32 {%r1, %r2, %r3}, [%q1]
    ld.shared.v4.b64 {%q1, %q2, %q3, %q4}, [%q1]
    ld.global.v8.b16 {%h1, %h2, %h3, %h4, %h5, %h6, %h7, %h8}, [%q1]
    ld.global.u32 %r1, [%q1], %q2
    ld.global.L2::cache_hint.u32 %r1, [%q1]
    ld.nc.u32 %r1, [%q1]
    ld.relaxed.gpu.global.nc.u32 %r1, [%q1]
    ld.relaxed.global.u32 %r1, [%q1]
    ld.gpu.global.u32 %r1, [%q1]
    ld.acquire.gpu.global.ca.u32 %r1, [%q1]
    ld.relaxed.gpu.local.u32 %r1, [%q1]
    ld.volatile.param.u32 %r1, [%q1]
    ld.release.gpu.global.u32 %r1, [%q1]
    ld.mmio.relaxed.sys.global.u32 %r1, [%q1]
    st.const.u32 [%q1], %r1
    st.acquire.gpu.global.u32 [%q1], %r1
    st.global.nc.u32 [%q1], %r1
    st.global.u64 [%q1], %r1
    st.global.v2.u32 [%q1], {%r1, _}
    st.global.ca.u32 [%q1], %r1
    st.param.u32 [p_x], %r1
    st.mmio.relaxed.sys.global.u32 [%q1], %r1
    ld.shared.u32 %r1, [own]
    ld.local.u32 %r1, [smem]
    ldu.shared.u32 %r1, [%q1]
    ldu.global.v4.b64 {%q1, %q2, %q3, %q4}, [%q1]
"""


@pytest.mark.parametrize("code", [line.strip() for line in REFUSED.strip().split("\n")])
def test_what_is_no_instruction_is_refused(code):
    text = kernel(f"{code};", "x", registers=".local .align 8 .b8 own[8];")
    with pytest.raises(UnknownInstruction, match=re.escape(code.split()[0])):
        launch(text, [In("x", np.zeros(64))], threads=1)


def test_orders_of_words_in_an_opcode():
    # Modifiers may come in any order, as compilers write them.
    x, y = numbers(1), np.zeros(1, np.uint32)
    for words in itertools.permutations(["relaxed", "gpu", "global", "u32"]):
        code = f"ld.{'.'.join(words)} %r1, [%x]; st.{'.'.join(words)} [%y], %r1;"
        launch(kernel(code, "x y"), [In("x", x), Out("y", y)], threads=1)
        assert y[0] == x[0]
