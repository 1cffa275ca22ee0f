import numpy as np
import pytest

from ptx.parse import parse
from ptx.program import layout
from ptx.syntax import PtxError

HEAD = ".version 9.0\n.target sm_90a\n.address_size 64\n"


def test_initialised_memory():
    module = parse(f"""{HEAD}
    .global .b32 unset[3];
    .const .align 32 .b8 bytes[5] = {{1, -2, 0xFF, 300}};
    .global .s16 rows[][3] = {{{{1, 2}}, {{-3}}}};
    .global .f32 floats[4] = {{0f3F800000, -0.1, 0d3FF8000000000000, 1e39}};
    .global .f64 doubles[2] = {{0.1, 0d8000000000000000}};
    .global .v2 .u32 pairs[2] = {{{{1, 2}}, {{3, 4}}}};
    .global .b32 one = -1;
    .global .u64 links[4] = {{generic(floats)+4, bytes + 2, 7}};
    .global .u8 low[8] = {{0xFF(one), 0xFF00(one), 0xFF0000(one), 0xFF000000(one), 0xFF00000000(one),
        0xFF0000000000(one), 0xFF000000000000(one), 0xFF00000000000000(generic(one))}};
    .entry k() {{ .reg .b64 %rd<2>; mov.u64 %rd1, rows+2; ld.const.b8 %rd1, [bytes+3]; ret; }}
    """)
    program = layout(module, "k")
    memory = {buffer.name: buffer for buffer in program.memory}
    held = {name: buffer.data.tobytes() for name, buffer in memory.items()}
    at = {name: buffer.address for name, buffer in memory.items()}
    assert held == {
        "unset": bytes(12),
        "bytes": bytes([1, 254, 255, 300 % 256, 0]),
        "rows": np.array([[1, 2, 0], [-3, 0, 0]], "<i2").tobytes(),
        "floats": np.array([1, -0.1, 1.5, np.inf], "<f4").tobytes(),
        "doubles": np.array([0.1, -0.0], "<f8").tobytes(),
        "pairs": np.array([1, 2, 3, 4], "<u4").tobytes(),
        "one": b"\xff" * 4,
        "links": np.array([at["floats"] + 4, at["bytes"] + 2, 7, 0], "<u8").tobytes(),
        "low": np.array(at["one"], "<u8").tobytes(),
    }
    assert [name for name, buffer in memory.items() if buffer.constant] == ["bytes"]
    assert at["bytes"] % 32 == 0
    assert [line.split(" 2 ", 1)[1] for line in program.text.split("\n")[-5:-3]] == [
        f"R 0 I {at['rows'] + 2}",
        f"R 0 A 0 1 I {at['bytes'] + 3}",
    ]


def test_kernels_of_a_module_share_its_memory():
    module = parse(f"{HEAD}.global .b32 x[4];\n.entry one() {{ ret; }}\n.entry two() {{ ret; }}")
    first, second = (layout(module, name).memory[0] for name in ("one", "two"))
    first.data[3] = 5
    assert second.data[3] == 5


def test_an_extern_variable_is_the_one_defined_later():
    module = parse(f"""{HEAD}.extern .global .b32 x[4];
    .entry k() {{ .reg .b64 %rd<2>; mov.u64 %rd1, x; }}
    .visible .global .b32 x[4];""")
    program = layout(module, "k")
    assert f"mov.u64 -1 0 2 R 0 I {program.memory[0].address}\n" in program.text


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            ".global .b32 x[2] = {1, 2, 3};",
            "line 4: the initialiser of x has 3 values in a row of 2",
        ),
        (".global .b32 x[2] = 3;", "line 4: the initialiser of x is not of its shape"),
        (".global .b32 x = {3};", "line 4: the initialiser of x is not of its shape"),
        (".global .b32 x[2][2] = {1, 2};", "line 4: the initialiser of x is not of its shape"),
        (
            ".global .u64 x = y;",
            "line 4: x holds the address of y, which has none in global memory",
        ),
        (
            ".shared .b32 y; .global .u64 x = y;",
            "line 4: x holds the address of y, which has none in global memory",
        ),
        (".global .u32 x = 0.5;", "line 4: x is of .u32 and holds 0d3FE0000000000000"),
        (".global .f32 x = 1;", "line 4: x is of .f32 and holds the integer 1"),
        (".global .b32 x[];", "line 4: x has no size"),
    ],
)
def test_initialisers_that_are_refused(text, sentence):
    with pytest.raises(PtxError) as caught:
        layout(parse(f"{HEAD}{text}\n.entry k() {{ ret; }}"), "k")
    assert str(caught.value) == sentence
