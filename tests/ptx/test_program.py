import ctypes
import math
from pathlib import Path

import numpy as np
import pytest

from ptx.nvcc import ptx_of, why_no_nvcc
from ptx.parse import parse
from ptx.program import layout
from ptx.syntax import PtxError

HEAD = ".version 9.0\n.target sm_90a\n.address_size 64\n"
REGISTERS = """.reg .pred %p<4>; .reg .b16 %rs<8>; .reg .b32 %r<12>; .reg .b64 %rd<8>;\
 .reg .f32 f; .reg .f64 d;"""


def program_of(body, scope="", params="", directives=""):
    module = parse(
        f"{HEAD}{scope}\n.visible .entry k({params}) {directives} {{ {REGISTERS}\n{body}\n}}"
    )
    return layout(module, "k")


def code_of(program):
    """Opcode, guard, negated, and the operands as one text, of each instruction."""
    lines = program.text.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("code "))
    code = [line.split(" ", 6) for line in lines[start + 1 :] if line]
    assert len(code) == int(lines[start].split()[1])
    return [(words[2], int(words[3]), int(words[4]), " ".join(words[6:])) for words in code]


def head_of(program):
    lines = program.text.split("\n")
    return dict(line.split(" ", 1) for line in lines if line and not line.startswith("I "))


def test_text():
    program = program_of(
        """mov.u32 %r3, %tid.x;
        mov.u64 %rd1, k_param_1; @!%p2 bra end;
        ld.param.b32 %r1, [k_param_0];
        end: st.shared.v2.b32 [tile+8], {%r1, _};
        """,
        scope=".shared .align 16 .b8 tile[64];",
        params=".param .u32 k_param_0, .param .align 64 .b8 k_param_1[128]",
        directives=".reqntid 128, 2 .maxntid 64, 8 .reqnctapercluster 4",
    )
    assert program.text == (
        "kernel k\nregs 4 32 64 1 32\nshared 64\nlocal 0\nparams 192\nscratch 0\n"
        "cluster 4 1 1\ncode 6\n"
        "I 6 mov.u32 -1 0 2 R 0 S %tid.x\n"
        "I 7 mov.u64 -1 0 2 R 1 M 64\n"
        "I 7 bra 2 1 1 L 4\n"
        "I 8 ld.param.b32 -1 0 2 R 3 A 0 1 M 0\n"
        "I 9 st.shared.v2.b32 -1 0 2 A 0 1 H 8 V 2 R 3 Z\n"
        "I 11 ret -1 0 0\n"
    )
    assert program.registers == ("%r3", "%rd1", "%p2", "%r1")
    assert program.lines[9 - 1].strip().startswith("end: st.shared")


@pytest.mark.parametrize(
    ("text", "operands"),
    [
        ("mov.u64 %rd1, 0xffffffffffffffff;", "R 0 I -1"),
        ("mov.u32 %r1, 0xffffffff;", "R 0 I 4294967295"),
        ("mov.s32 %r1, -3;", "R 0 I -3"),
        ("mov.f32 f, 0f3F800000;", "R 0 I 1065353216"),
        # ptxas: 0f… stays as it is; doubles take the instruction's type.
        ("mov.f64 d, 0f3F800000;", "R 0 I 1065353216"),
        ("mov.f32 f, 0d3FF8000000000000;", "R 0 I 1069547520"),
        ("mov.f32 f, -0.1;", f"R 0 I {np.float32(-0.1).view(np.uint32)}"),
        ("mov.f32 f, 1e39;", f"R 0 I {np.float32(np.inf).view(np.uint32)}"),
        ("mov.f64 d, -0.1;", f"R 0 I {np.float64(-0.1).view(np.int64)}"),
        ("mov.b64 %rd1, 0.1;", f"R 0 I {np.float64(0.1).view(np.int64)}"),
        ("set.lt.f32.f64 f, d, 0.1;", f"R 0 R 1 I {np.float64(0.1).view(np.int64)}"),
        ("mov.b64 {%r1, _}, %rd1;", "V 2 R 0 Z R 1"),
        ("elect.sync %r1|%p1, -1;", "P R 0 R 1 I -1"),
        ("and.pred %p1, %p2, !%p1;", "R 0 R 1 N 0"),
        ("ld.shared.b32 %r1, [%r2+-4];", "R 0 A -4 1 R 1"),
        ("ld.shared.b32 %r1, [64];", "R 0 A 0 1 I 64"),
        ("ld.local.b32 %r1, [depot+4];", "R 0 A 0 1 D 4"),
        ("mov.u32 %r1, tile+4;", "R 0 H 4"),
        (
            "copy [%r1], [%rd1+8, {%r2, %r1}], [%r1], {%rs1};",
            "A 0 1 R 0 A 8 2 R 1 V 2 R 2 R 0 A 0 1 R 0 V 1 R 3",
        ),
        ("brx.idx %r1, t; t: .branchtargets a, b, a; a: ret; b:", "R 0 T 3 1 2 1"),
    ],
)
def test_operands(text, operands):
    scope = ".shared .b32 tile[4];"
    program = program_of(f".local .b32 depot[4]; {text}", scope)
    assert code_of(program)[0][3] == operands


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("mov.b32 %r1, 0.5;", "line 6: mov.b32 takes no double such as 0d3FE0000000000000"),
        (
            "slct.f64.f32 d, d, 0.5, f;",
            "line 6: slct.f64.f32 takes no double such as 0d3FE0000000000000",
        ),
        (
            "mov.u64 %rd1, 0x10000000000000000;",
            "line 6: 18446744073709551616 has more than 64 bits",
        ),
        ("mov.u64 %rd1, far;", "line 6: far is extern, and the module doesn't define it"),
        ("mov.u64 %rd1, none;", "line 6: the address of none: indirect calls are not executed"),
        (
            "p: .callprototype (.param .b32 _) _ (.param .b32 _); call (%r1), %rd1, (%r1), p;",
            "line 6: indirect calls are not executed",
        ),
        ("call none, (%r1);", "line 6: none takes 0 arguments and returns 0, not 1 and 0"),
        ("call vprintf;", "line 6: vprintf is an extern function, which is not executed"),
        ("call k;", "line 6: k is a kernel, which can't be called"),
        ("call again;", "line 4: recursion is not executed: again calls over calls again"),
        ("{ .param .b64 wide; call one, (wide); }", "line 6: wide can't be passed as in"),
        ("call one, (tile);", "line 6: tile can't be passed as in"),
    ],
)
def test_what_is_not_laid_out(text, sentence):
    scope = """.extern .global .b32 far[]; .shared .b32 tile; .extern .func vprintf();
        .func none() { ret; } .func one(.param .b32 in) { ret; }
        .func over(); .func again() { call over; } .func over() { call again; }""".replace("\n", "")
    with pytest.raises(PtxError) as caught:
        program_of(text, scope)
    assert str(caught.value) == sentence


def test_a_kernel_that_is_not_there():
    module = parse(
        f"{HEAD}.entry one() {{ ret; }}\n.entry two() {{ ret; }}\n.func three() {{ ret; }}"
    )
    for name in ("four", "three"):
        with pytest.raises(PtxError) as caught:
            layout(module, name)
        assert str(caught.value) == f"there is no kernel {name}; the module's kernels: one, two"
    with pytest.raises(PtxError) as caught:
        layout(parse(HEAD), "one")
    assert str(caught.value) == "there is no kernel one; the module's kernels: none"


# Shared and local memory


def test_shared_and_local_memory():
    program = program_of(
        """.shared .align 16 .b8 own[20]; .local .b8 depot[3]; .local .align 8 .b8 more[8];
        mov.u32 %r1, flag; mov.u32 %r1, own; mov.u32 %r1, smem+8; mov.u32 %r1, also;
        mov.u64 %rd1, depot; mov.u64 %rd1, more+4; { .shared .b64 own; mov.u32 %r1, own; }
        """,
        scope=".shared .b8 flag; .shared .b32 unused[9];"
        ".extern .shared .align 16 .b8 smem[]; .extern .shared .b32 also[];",
    )
    places = [operands.split(" ", 2)[2] for *_, operands in code_of(program)[:-1]]
    assert places == ["H 0", "H 16", "H 1032", "H 1024", "D 0", "D 12", "H 40"]
    assert (program.shared, program.dynamic) == (1024, 1024)
    assert (head_of(program)["shared"], head_of(program)["local"]) == ("1024", "16")


def test_without_a_launchs_memory_nothing_is_rounded():
    program = program_of(".shared .b8 own[20]; mov.u32 %r1, own;")
    assert (program.shared, program.dynamic) == (20, None)
    program = program_of("mov.u32 %r1, smem;", scope=".extern .shared .b8 smem[];")
    assert (program.shared, program.dynamic) == (0, 0)


# Calls


def test_calls_are_lowered():
    program = program_of(
        """{ .param .b32 param0; .param .align 8 .b8 param1[12]; .param .b32 retval0;
        st.param.b32 [param0+0], %r1; st.param.b8 [param1+9], %rs1;
        @%p1 call.uni (retval0), sum, (param0, param1); ld.param.b32 %r2, [retval0]; }
        call leaf; bra end; end:""",
        scope=""".func leaf() { .reg .b32 %r<2>; mov.b32 %r1, 1; }
        .func (.param .b32 out) sum(.param .b32 in, .param .align 8 .b8 pair[12]) {
        .reg .b32 %r<2>; ld.param.b32 %r1, [in]; ld.param.b8 %r1, [pair+9]; call leaf;
        st.param.b32 [out], %r1; ret; }
        """,
    )
    assert head_of(program)["scratch"] == "44"
    assert code_of(program) == [
        ("st.param.b32", -1, 0, "A 0 1 Q 0 R 0"),
        ("st.param.b8", -1, 0, "A 0 1 Q 17 R 1"),
        ("copy.scratch", 2, 0, "Q 20 Q 0 I 4"),
        ("copy.scratch", 2, 0, "Q 24 Q 8 I 12"),
        ("call", 2, 0, "L 10"),
        ("copy.scratch", 2, 0, "Q 36 Q 40 I 4"),
        ("ld.param.b32", -1, 0, "R 3 A 0 1 Q 36"),
        ("call", -1, 0, "L 16"),
        ("bra", -1, 0, "L 9"),
        ("ret", -1, 0, ""),
        ("ld.param.b32", -1, 0, "R 4 A 0 1 Q 20"),
        ("ld.param.b8", -1, 0, "R 4 A 0 1 Q 33"),
        ("call", -1, 0, "L 16"),
        ("st.param.b32", -1, 0, "A 0 1 Q 40 R 4"),
        ("ret", -1, 0, ""),
        ("ret", -1, 0, ""),
        ("mov.b32", -1, 0, "R 5 I 1"),
        ("ret", -1, 0, ""),
    ]


def test_registers_and_numbers_as_arguments():
    """Functions whose parameters lie in registers, and scalars that are given without a variable."""
    program = program_of(
        "call (%r1), sum, (%r2, 7); call (_), in_memory, (%r1); call (%r3), in_memory, (0f3F800000);",
        scope=""".func (.reg .b32 out) sum(.reg .b32 x, .reg .b32 y) { add.s32 out, x, y; }
        .func (.param .b32 out) in_memory(.param .b32 x) { ret; }""",
    )
    assert code_of(program) == [
        ("mov.b32", -1, 0, "R 0 R 1"),
        ("mov.b32", -1, 0, "R 2 I 7"),
        ("call", -1, 0, "L 10"),
        ("mov.b32", -1, 0, "R 3 R 4"),
        ("st.param.b32", -1, 0, "A 0 1 Q 0 R 3"),
        ("call", -1, 0, "L 12"),
        ("st.param.b32", -1, 0, "A 0 1 Q 0 I 1065353216"),
        ("call", -1, 0, "L 12"),
        ("ld.param.b32", -1, 0, "R 5 A 0 1 Q 4"),
        ("ret", -1, 0, ""),
        ("add.s32", -1, 0, "R 4 R 0 R 2"),
        ("ret", -1, 0, ""),
        ("ret", -1, 0, ""),
        ("ret", -1, 0, ""),
    ]


def test_an_assertion_that_fails_stops():
    program = program_of(
        "{ .param .b64 param0; st.param.b64 [param0], %rd1; @%p1 call.uni __assertfail, (param0); }",
        scope=".extern .func __assertfail(.param .b64 message);",
    )
    assert code_of(program)[1] == ("assertfail", 1, 0, "")


# What nvcc writes


@pytest.fixture(scope="module")
def compiled():
    if why_not := why_no_nvcc():
        pytest.skip(why_not)
    return parse(ptx_of(Path(__file__).parent / "cuda" / "parse.cu", 90))


def test_nvcc_parameters(compiled):
    mixed = layout(compiled, "mixed")
    assert [(p.type, p.offset, p.size, p.alignment, p.array) for p in mixed.params] == [
        ("u64", 0, 8, 8, False),
        ("b8", 8, 24, 8, True),
        ("u32", 32, 4, 4, False),
        ("b8", 64, 128, 64, True),
        ("f32", 192, 4, 4, False),
    ]
    assert mixed.directives == {"maxntid": (128, 1, 1), "minnctapersm": (2,)}
    assert head_of(mixed)["local"] == "32"
    # Integers of the kernel and of a function that it calls, the launch's memory behind them.
    assert mixed.dynamic == math.ceil((129 + 4) * 4 / 1024) * 1024
    assert head_of(layout(compiled, "branches"))["cluster"] == "2 1 1"


def test_nvcc_memory(compiled):
    memory = {buffer.name: buffer for buffer in layout(compiled, "mixed").memory}

    def held(name, kind):
        return memory[name].data.view(kind).tolist()

    assert held("table", "<f4") == [1.0, -0.5, 2.25, float(np.float32(0.001))]
    assert held("unset", "<i4") == [0, 0, 0]
    assert held("values", "<i4") == [1, -2, 3]
    assert held("weights", "<f8") == [0.1, -1e300]
    assert held("grid", "<i4") == [1, 2, 3, 4, 0, 0]
    pointed = [ctypes.c_int32.from_address(address).value for address in held("pointers", "<u8")]
    assert pointed == [1, 3]
    value, entry, rank = held("node", "<u8")
    assert (value, ctypes.c_float.from_address(entry).value, rank) == (3, -0.5, (-7) % 2**16)
    assert {name for name, buffer in memory.items() if buffer.constant} == {"table", "unset"}


def test_nvcc_calls(compiled):
    """What a call copies is what the function loads; what the function stores is copied back."""
    code = code_of(layout(compiled, "mixed"))
    opcodes = [opcode for opcode, *_ in code]
    assert opcodes.count("assertfail") == 1

    def copied(index):
        _, to, _, source, _, size = code[index][3].split()
        return int(to), int(source), int(size)

    sizes = []
    for at in (i for i, opcode in enumerate(opcodes) if opcode == "call"):
        first = at
        while opcodes[first - 1] == "copy.scratch":
            first -= 1
        _, returned, size = copied(at + 1)
        sizes.append(([copied(i)[2] for i in range(first, at)], size))
        entry = int(code[at][3].split()[1])
        body = code[entry : opcodes.index("ret", entry)]
        loaded, stored = (
            [
                int(operands.split("Q ")[1].split()[0])
                for opcode, *_, operands in body
                if opcode.startswith(kind)
            ]
            for kind in ("ld.param", "st.param")
        )
        assert {copied(i)[0] for i in range(first, at)} <= set(loaded)
        assert min(stored) == returned
        assert max(stored) < returned + size
    assert sizes == [([24, 4], 24), ([4], 4)]


def test_nvcc_branches(compiled):
    code = code_of(layout(compiled, "branches"))
    opcodes = [opcode for opcode, *_ in code]
    # Each block of inline assembly branches to its own comparison, by its own predicate.
    loops = [i for i, (opcode, guard, *_) in enumerate(code) if opcode == "bra" and guard >= 0]
    assert [code[i][3] for i in loops] == [f"L {i - 1}" for i in loops]
    assert [opcodes[i - 1] for i in loops] == ["setp.eq.u32", "setp.ne.u32"]
    assert len({code[i][1] for i in loops}) == 2
    # first: mov, bra; second: mov; done:
    table = opcodes.index("brx.idx")
    assert code[table][3].split(" T ")[1] == f"3 {table + 1} {table + 3} {table + 1}"
    assert code[table + 2][3] == f"L {table + 4}"
