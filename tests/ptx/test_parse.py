import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptx.parse import parse
from ptx.syntax import (
    Address,
    Float,
    Instruction,
    Integer,
    Link,
    Not,
    Pair,
    PtxError,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)

HEAD = ".version 9.0\n.target sm_90a\n.address_size 64\n"
REGISTERS = ".reg .pred %p<4>; .reg .b16 %rs<8>; .reg .b32 %r<12>; .reg .b64 %rd<8>; .reg .f32 f;"


def body_of(text, declarations=REGISTERS, scope=""):
    """The instructions of a kernel with this text, whose lines count from 1."""
    before = f"{HEAD}{scope}\n.visible .entry k() {{ {declarations}\n"
    try:
        body = parse(before + text + "\n}").functions["k"].body
    except PtxError as error:
        line, sentence = str(error)[len("line ") :].split(": ", 1)
        raise PtxError(f"line {int(line) - before.count(chr(10))}: {sentence}") from None
    for instruction in body:
        instruction.line -= before.count("\n")
    return body


def operands_of(text, **more):
    (instruction,) = body_of(text, **more)
    return instruction.operands


def test_version_and_target():
    module = parse(".version 8.7\n.target sm_100a, debug\n.address_size 64")
    assert (module.version, module.target, module.kernels) == ("8.7", ("sm_100a", "debug"), [])


# Layout of a text: comments, several instructions a line, instructions over several lines


def test_where_instructions_stand():
    body = body_of("""add.s32 %r1, %r2, 3; sub.s32 %r1, // a comment; with text
      %r2,
      /* one over
         lines */ 4
    ;
    .loc 1 52 0 // forward.py
    .loc	2 43 13, function_name $L__info_string0, inlined_at 1 107 18 // standard.py
    .loc 2 43 12, function_name .debug_str+16, inlined_at 1 107 18
    @!%p1 bra.uni end; ld .global .b32 %r1, [%rd1];
    end:""")
    assert [(i.line, i.opcode) for i in body] == [
        (1, "add.s32"),
        (1, "sub.s32"),
        (9, "bra.uni"),
        (9, "ld.global.b32"),
    ]
    assert (body[2].guard.name, body[2].negated, body[2].operands[0].index) == ("%p1", True, 4)


def test_what_is_no_code_is_passed_over():
    module = parse(f"""{HEAD}
    .file 1 "/a//b/forward.py"
    .file 2 "standard.py", 1700000000, 100
    .pragma "nounroll";
    .entry k() .pragma "used_bytes_mask 1"; {{ .pragma "nounroll"; ret; }}
    .section .debug_str {{
    $L__info_string0:
    .b8 108 // offset 0; }}
    .b64 $L__info_string0
    }}
    .section .debug_macinfo {{ }}
    """)
    assert [str(i) for i in module.functions["k"].body] == ["ret;"]


# Operands


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-1", -1),
        ("42U", 42),
        ("0x7701U", 0x7701),
        ("0xffffffffffffffff", 2**64 - 1),
        ("-0x10", -16),
        ("0b101", 5),
        ("017", 15),
        ("WARP_SZ", 32),
    ],
)
def test_integers(text, value):
    assert operands_of(f"mov.u32 %r1, {text};")[1] == Integer(value)


@pytest.mark.parametrize(
    ("text", "value", "width"),
    [
        ("0f3F800000", 1.0, 32),
        ("0F3f800000", 1.0, 32),
        ("0d3FF8000000000000", 1.5, 64),
        ("0.5", 0.5, 64),
        ("-0.5", -0.5, 64),
        ("1.", 1.0, 64),
        ("2e-3", 0.002, 64),
        ("1.5E+3", 1500.0, 64),
    ],
)
def test_floats(text, value, width):
    bits = int.from_bytes(struct.pack("<f" if width == 32 else "<d", value), "little")
    assert operands_of(f"mov.f32 f, {text};")[1] == Float(bits, width)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("ld.global.b32 %r1, [%rd1];", "ld.global.b32 %r1, [%rd1];"),
        ("ld.global.b32 %r1, [ %rd1 + 16 ];", "ld.global.b32 %r1, [%rd1+16];"),
        ("ld.global.b32 %r1, [%rd1+-4];", "ld.global.b32 %r1, [%rd1+-4];"),
        ("ld.global.b32 %r1, [%rd1 - 4 + 1];", "ld.global.b32 %r1, [%rd1+-3];"),
        ("ld.shared.b32 %r1, [tile+8];", "ld.shared.b32 %r1, [tile+8];"),
        ("ld.shared.b32 %r1, [4096];", "ld.shared.b32 %r1, [4096];"),
        ("mov.u32 %r1, tile + 4;", "mov.u32 %r1, tile+4;"),
        ("mov.u32 %r1, %tid.x;", "mov.u32 %r1, %tid.x;"),
        ("mov.b64 {%r1,_}, %rd1;", "mov.b64 {%r1, _}, %rd1;"),
        ("elect.sync %r1|%p1, -1;", "elect.sync %r1|%p1, -1;"),
        ("elect.sync _|%p1, 0xffffffff;", "elect.sync _|%p1, 4294967295;"),
        ("and.pred %p1, %p2, !%p3;", "and.pred %p1, %p2, !%p3;"),
        (
            "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"
            " [%r1], [%rd1, {%r2, %r3}], [%r4];",
            "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"
            " [%r1], [%rd1, {%r2, %r3}], [%r4];",
        ),
        ("@%p1 st.shared.v2.b32 [%r1], {%r2, 0};", "@%p1 st.shared.v2.b32 [%r1], {%r2, 0};"),
    ],
)
def test_operands(text, read):
    (instruction,) = body_of(text, scope=".shared .align 16 .b8 tile[64];")
    assert str(instruction) == read


# Registers and scopes


def test_registers_of_all_kinds():
    body = body_of(
        "mov.u32 %r11, %r0; mov.b32 counter, other; mov.f32 v.y, w.a; mov.b16 h1, %rs7;"
        "mov.v2.f32 v, {f, f};",
        REGISTERS + ".reg .s32 counter, other; .reg .v2 .f32 v; .reg .v4 .f32 w; .reg .b8 h1;",
    )
    registers = [[o for o in i.operands if isinstance(o, Register)] for i in body]
    assert [[(r.name, r.type, r.width) for r in both] for both in registers[:4]] == [
        [("%r11", "b32", 32), ("%r0", "b32", 32)],
        [("counter", "s32", 32), ("other", "s32", 32)],
        [("v.y", "f32", 32), ("w.w", "f32", 32)],
        [("h1", "b8", 16), ("%rs7", "b16", 16)],
    ]
    assert body[4].operands[0].items[1] is registers[2][0]


def test_ranges_of_registers_that_look_alike():
    (instruction,) = body_of("cvt.u64.u32 %r12, %r1;", ".reg .b32 %r<12>; .reg .b64 %r1<3>;")
    assert [r.type for r in instruction.operands] == ["b64", "b32"]


def test_a_register_is_one_object():
    first, second = body_of("mov.u32 %r1, 1; mov.u32 %r2, %r1;")
    assert first.operands[0] is second.operands[1]


def test_inline_assembly_has_names_of_its_own():
    block = """{ .reg .pred p; .reg .b32 %r<2>;
        again: setp.eq.u32 p, %r1, %r5; @p bra again; @p bra out; }"""
    body = body_of(f"mov.u32 %r1, 0; {block} {block} out: mov.u32 %r1, 0;")
    outer, first, loop, leave, second, loop_2, _, last = body
    assert outer.operands[0] is last.operands[0]
    assert len({id(i.operands[1]) for i in (first, second)} | {id(outer.operands[0])}) == 3
    assert first.operands[2] is second.operands[2]  # %r5 is the kernel's
    assert first.operands[0] is loop.guard is not loop_2.guard
    assert (loop.operands[0].index, loop_2.operands[0].index, leave.operands[0].index) == (1, 4, 7)


def test_an_inner_label_is_nearer_than_an_outer_one():
    body = body_of("{ { bra place; place: ret; } bra place; }\nplace: ret;")
    assert [i.operands[0].index for i in body if i.opcode == "bra"] == [1, 3]


def test_a_table_of_labels():
    body = body_of("brx.idx %r1, table;\ntable: .branchtargets one, two,\n one;\none: ret;\ntwo:")
    assert [target.index for target in body[0].operands[1].table] == [1, 2, 1]


# Functions and parameters


def test_a_kernel():
    kernel = parse(f"""{HEAD}
    .visible .entry k(.param .align 64 .b8 desc[128], .param .u64 .ptr .global .align 1 x, .param .f32 s,
        .param .u64 .ptr y) .reqntid 128, 2 .minnctapersm 1 .maxnreg 64 .explicitcluster
        .reqnctapercluster 2, 1, 1 .maxclusterrank 8 {{ ret; }}""").functions["k"]
    assert [(p.name, p.type, p.shape, p.align, p.size, p.pointer) for p in kernel.params] == [
        ("desc", "b8", (128,), 64, 128, False),
        ("x", "u64", (), 8, 8, True),
        ("s", "f32", (), 4, 4, False),
        ("y", "u64", (), 8, 8, True),
    ]
    assert kernel.directives == {
        "reqntid": (128, 2),
        "minnctapersm": (1,),
        "maxnreg": (64,),
        "explicitcluster": (),
        "reqnctapercluster": (2, 1, 1),
        "maxclusterrank": (8,),
    }


def test_functions_and_calls():
    module = parse(f"""{HEAD}
    .extern .func __assertfail (.param .b64 a, .param .b32 b) .noreturn;
    .func (.param .b32 out) f (.param .b32 in, .param .align 8 .b8 pair[16]);
    .entry k {{
        .reg .b32 %r<2>;
        {{ .param .b32 param0; .param .align 8 .b8 param1[16]; .param .b32 retval0;
        call.uni (retval0), f, (param0, param1); call f; call (%r1), f, (%r1, 3); }}
    }}
    .visible .func (.param .b32 out) f (.param .b32 in, .param .align 8 .b8 pair[16]) {{ ret; }}
    """)
    f, k = module.functions["f"], module.functions["k"]
    assert [str(i) for i in k.body] == [
        "call.uni (retval0), f, (param0, param1);",
        "call f;",
        "call (%r1), f, (%r1, 3);",
    ]
    # The call stands before the definition, and means it.
    assert k.body[0].operands[1] == Symbol(f)
    assert [(p.name, p.size) for p in (*f.returns, *f.params)] == [
        ("out", 4),
        ("in", 4),
        ("pair", 16),
    ]
    assert (len(f.body), module.functions["__assertfail"].body, module.kernels) == (1, None, ["k"])


# Variables


def test_variables():
    module = parse(f"""{HEAD}
    .extern .shared .align 16 .b8 smem[];
    .shared .align 8 .b64 barrier;
    .global .attribute(.managed) .u32 count;
    .visible .global .v4 .f32 rows[2][3], more[5];
    .const .align 4 .b8 table[4] = {{1, -2, 0x03}};
    .weak .global .f32 floats[] = {{0f3F800000, -0.5}};
    .global .align 8 .u64 places[3] = {{generic(floats)+4, table + 2, 7}};
    .global .u8 low[2] = {{0xFF(floats), 0xFF00(generic(floats)+4)}};
    .global .s32 grid[][2] = {{{{1, 2}}, {{3}}}};
    .common .global .b32 shared_by_all[4];
    """)
    found = {
        v.name: (v.space, v.linkage, v.shape, v.align, v.size) for v in module.variables.values()
    }
    assert found == {
        "smem": ("shared", "extern", (None,), 16, 0),
        "barrier": ("shared", "", (), 8, 8),
        "count": ("global", "", (), 4, 4),
        "rows": ("global", "visible", (2, 3), 16, 96),
        "more": ("global", "visible", (5,), 16, 80),
        "table": ("const", "", (4,), 4, 4),
        "floats": ("global", "weak", (2,), 4, 8),
        "places": ("global", "", (3,), 8, 24),
        "low": ("global", "", (2,), 1, 2),
        "grid": ("global", "", (2, 2), 4, 16),
        "shared_by_all": ("global", "common", (4,), 4, 16),
    }
    one, half = Float(0x3F800000, 32), Float(0xBFE0000000000000, 64)
    assert module.variables["table"].initial == (Integer(1), Integer(-2), Integer(3))
    assert module.variables["floats"].initial == (one, half)
    assert module.variables["places"].initial == (Link("floats", 4), Link("table", 2), Integer(7))
    assert module.variables["low"].initial == (Link("floats", 0, 0xFF), Link("floats", 4, 0xFF00))
    assert module.variables["grid"].initial == ((Integer(1), Integer(2)), (Integer(3),))


def test_variables_of_a_function():
    body = body_of(
        "mov.u64 %rd1, depot; { .shared .b32 tile[4]; mov.u32 %r1, tile; }",
        REGISTERS + ".local .b8 depot[8];",
    )
    assert [i.operands[1].target.space for i in body] == ["local", "shared"]


# What is refused


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "line 1: this is not PTX, which starts with .version: the text ends"),
        ("# a page\n", "line 1: this is not PTX, which starts with .version: found '#'"),
        ("\n\n\x7fELF", "line 3: this is not PTX, which starts with .version: found '\\x7f'"),
        (".version 9.0\nret;", "line 2: expected '.target' after .version, found 'ret'"),
        (f"{HEAD}.alias f, g;", "line 4: unknown directive .alias"),
        (f"{HEAD}ret;", "line 4: expected a directive, found 'ret'"),
        (f"{HEAD}.global .b33 x;", "line 4: unknown type .b33"),
        (f"{HEAD}.global x;", "line 4: expected a type, found 'x'"),
        (f"{HEAD}.global .b32 3;", "line 4: expected the name of a variable, found '3'"),
        (
            f"{HEAD}.global .b32 x\n.global",
            "line 5: expected ';' after the declaration of x, found '.global'",
        ),
        (f"{HEAD}.global .b32 x;\n.global .b32 x;", "line 5: x is declared twice"),
        (f"{HEAD}.global .b32 x[2][];", "line 4: only the first size of x may be left open"),
        (f"{HEAD}.shared .b32 x = 3;", "line 4: x has an initialiser, but lies in .shared"),
        (
            f'{HEAD}.global .b8 x[3] = "ab";',
            "line 4: expected a number or the name of a variable, found '\"ab\"'",
        ),
        (f"{HEAD}.entry k() .fast {{ }}", "line 4: unknown directive .fast of k"),
        (
            f"{HEAD}.entry k() .maxnreg 8, 9 {{ }}",
            "line 4: .maxnreg of k has 2 numbers, expected at most 1",
        ),
        (f"{HEAD}.entry k() {{ ret; }}\n.entry k() {{ }}", "line 5: k is defined twice"),
        (f"{HEAD}.entry k(.reg .b32 x) {{ }}", "line 4: kernel k has a parameter in .reg"),
        (f"{HEAD}.entry k() \nret;", "line 5: expected '{' before the body of k, found 'ret'"),
        (f"{HEAD}\n.entry k() {{\n{{ ret; }}\n", "line 5: the body of k has no end"),
        (
            f"{HEAD}.section .debug_str {{ .b8 1",
            "line 4: expected '}' at the end of .section, the text ends",
        ),
        (".version 9.0\n.target sm_20\n.address_size 32", "line 3: only .address_size 64 is read"),
    ],
)
def test_modules_that_are_refused(text, sentence):
    with pytest.raises(PtxError) as caught:
        parse(text)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ret;\nadd.s32 %r1, %r12, 3;", "line 2: register %r12 is not declared"),
        ("add.s32 %r1, %r01, 3;", "line 1: register %r01 is not declared"),
        ("mov.u32 %r1, %tid.q;", "line 1: register %tid.q is not declared"),
        ("ret;\n\nmov.u64 %rd1,\n tile;", "line 4: tile is not declared"),
        ("ret;\n@%p1 bra away;", "line 2: label away is missing"),
        ("{ away: ret; }\nbra away;", "line 2: label away is missing"),
        ("brx.idx %r1, t;\nt: .branchtargets away;", "line 2: label away is missing"),
        ("a: ret;\na: ret;", "line 2: label a stands twice"),
        (".reg .b32 %r<3>;", "line 1: register %r is declared twice"),
        (".reg .v2 .b32 %v<3>;", "line 1: vectors of registers can't be counted: %v<…>"),
        ("@%r1 ret;", "line 1: %r1 is not declared as a predicate"),
        ("and.pred %p1, %p2, !%r1;", "line 1: %r1 is not declared as a predicate"),
        (
            "add.s32 %r1, %r2 3;",
            "line 1: expected ';' or ',' after an operand of add.s32, found '3'",
        ),
        (
            "add.s32 %r1, 2 * 3;",
            "line 1: expected ';' or ',' after an operand of add.s32, found '*'",
        ),
        ("ret", "line 2: expected an operand, found '}'"),
        ("ld.b32 %r1, [%rd1;", "line 1: expected ']' after an address, found ';'"),
        ("ld.b32 %r1, [%rd1+f];", "line 1: expected an offset, found 'f'"),
        ("ld.b32 %r1, [%rd1+0.5];", "line 1: expected an offset as an integer, found '0.5'"),
        ("mov.b64 {%r1, %r2, %rd1;", "line 1: expected '}' after a vector, found ';'"),
        ("mov.u32 %r1, 08;", "line 1: 08 is no octal number"),
        ("mov.u32 %r1, ;", "line 1: expected an operand, found ';'"),
        ("Add.s32 %r1, %r1, 1;", "line 1: expected an instruction, found 'Add.s32'"),
        (".shard .b32 x;", "line 1: unknown directive .shard"),
        (".shared .b32 x[-1];", "line 1: expected a size from 0, found -1"),
        (".local .pred x;", "line 1: unknown type .pred"),
    ],
)
def test_bodies_that_are_refused(text, sentence):
    with pytest.raises(PtxError) as caught:
        body_of(text)
    assert str(caught.value) == sentence


# Printed and read again

_NAMES = {"pred": "%p{}", "b16": "%rs{}", "b32": "%r{}", "b64": "%rd{}"}
_MODULE = parse(f"{HEAD}.shared .align 16 .b8 tile[64];\n.global .u64 data[4];")
_bits = st.integers(0, 2**64 - 1)
_registers = st.builds(
    lambda kind, i: Register(_NAMES[kind].format(i), kind),
    st.sampled_from([*_NAMES]),
    st.integers(0, 3),
)
_predicates = st.builds(lambda i: Register(f"%p{i}", "pred"), st.integers(0, 3))
_symbols = st.builds(Symbol, st.sampled_from([*_MODULE.variables.values()]), st.integers(-9, 9))
_scalars = st.one_of(
    _registers,
    st.builds(Integer, st.integers(-(2**63), 2**64 - 1)),
    st.builds(lambda bits: Float(bits >> 32, 32), _bits),
    st.builds(Float, _bits, st.just(64)),
    st.builds(
        Special, st.sampled_from(["%tid.x", "%ctaid.z", "%laneid", "%clock64", "%globaltimer"])
    ),
    st.builds(Sink),
    st.builds(Not, _predicates),
    _symbols,
)
_vectors = st.builds(lambda items: Vector(tuple(items)), st.lists(_scalars, min_size=1, max_size=4))
_addresses = st.one_of(
    st.builds(
        lambda base, offset, rest: Address(base, offset, tuple(rest)),
        st.one_of(_registers, st.builds(Integer, st.integers(0, 99))),
        st.integers(-999, 999),
        st.lists(_vectors, max_size=2),
    ),
    st.builds(Address, _symbols),
)
_operands = st.one_of(
    _scalars,
    _vectors,
    _addresses,
    st.builds(Pair, st.one_of(_registers, st.builds(Sink)), _predicates),
)
_opcodes = st.sampled_from(
    ["ret", "add.s32", "fence.proxy.async.shared::cta", "mbarrier.try_wait.parity.shared::cta.b64"]
)


@st.composite
def _instructions(draw, line):
    guard = draw(st.none() | _predicates)
    negated = guard is not None and draw(st.booleans())
    return Instruction(
        line, draw(_opcodes), tuple(draw(st.lists(_operands, max_size=4))), guard, negated
    )


@given(st.data())
def test_printing_and_reading_is_the_identity(data):
    drawn = [data.draw(_instructions(line)) for line in range(1, data.draw(st.integers(1, 5)) + 1)]
    scope = ".shared .align 16 .b8 tile[64];\n.global .u64 data[4];"
    assert repr(body_of("\n".join(map(str, drawn)), scope=scope)) == repr(drawn)


# Text that breaks off, or lacks a word

EVERYTHING = f"""{HEAD}.extern .shared .align 16 .b8 smem[];
.global .align 8 .u64 links[2][2] = {{{{generic(smem)+4, 0xFF(links)}}, {{-1}}}};
.func (.param .b32 out) f (.param .b32 in) ;
.visible .entry k(.param .u64 .ptr .global .align 1 x, .param .align 64 .b8 map[128]) .maxntid 32, 1
{{
  .reg .pred %p<3>; .reg .v2 .f32 v; .reg .b32 %r<5>, n;
  .param .b32 given; .pragma "nounroll";
  ld.param.b32 %r1, [x+-4]; @!%p1 bra end; elect.sync _|%p2, -1;
  brx.idx %r1, table; table: .branchtargets end, again;
  again: {{ .reg .b32 %r<2>; st.shared.v2.b32 [smem+16], {{%r1, _}}; mov.f32 v.x, -0.5; }}
  call.uni (given), f, (given, 3); cp.async.bulk [%r1], [n, {{%r2, n}}], [%r3]; end:
}}
.section .debug_str {{ .b8 1 }}
"""


@given(st.data())
def test_broken_text_is_read_or_refused_by_a_sentence(data):
    parse(EVERYTHING)
    words = EVERYTHING.replace(",", " , ").replace(";", " ; ").replace("[", "[ ").split(" ")
    at = data.draw(st.integers(0, len(words) - 1))
    kept = data.draw(
        st.sampled_from([words[:at], words[:at] + words[at + 1 :], [*words[:at], *words[at - 1 :]]])
    )
    # No other error comes out.
    with suppress(PtxError):
        parse(" ".join(kept))
