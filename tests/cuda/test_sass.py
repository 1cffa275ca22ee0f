"""Stalls read from machine code, held against kernels whose schedule is known."""

import pytest
import sass
from on_machine import needs_nvcc
from ptx import nvcc

pytest.importorskip("triton")  # whose cuobjdump reads machine code

pytestmark = needs_nvcc

CHAIN = """.version 8.0
.target {target}
.address_size 64
.visible .entry chain(.param .u64 y, .param .u32 n, .param .f32 a) {{
.reg .b64 %y; .reg .b32 %n; .reg .f32 %a, %v<16>; .reg .pred %more;
ld.param.u64 %y, [y]; ld.param.u32 %n, [n]; ld.param.f32 %a, [a];
{zeros}
again:
{body}
sub.u32 %n, %n, 1;
setp.ne.u32 %more, %n, 0;
@%more bra again;
{stores}
ret;
}}
"""
FFMAS = 64
LATENCY = 4
"""Clocks of an FFMA, since Volta: of one after another each waits so long for the last."""


def chains(count, capability):
    """The loop of so many independent chains of FFMA, 64 in all."""
    text = CHAIN.format(
        target=nvcc.TARGETS[capability],
        zeros="\n".join(f"mov.f32 %v{i}, %a;" for i in range(count)),
        body="\n".join(f"fma.rn.f32 %v{i % count}, %v{i % count}, %a, %a;" for i in range(FFMAS)),
        stores="\n".join(f"st.global.f32 [%y + {4 * i}], %v{i};" for i in range(count)),
    )
    code = sass.compiled(text, capability)["chain"]
    (loop,) = [
        (first, last) for first, last in sass.loops(code)
        if sum(one.opcode.startswith("FFMA") for one in code[first : last + 1]) == FFMAS
    ]  # fmt: skip
    return code, loop


@pytest.mark.parametrize("capability", [80, 86, 90])
def test_dependent_ffmas_stall_for_their_latency(capability):
    code, (first, last) = chains(1, capability)
    clocks = sass.stalls_to(code, last)[first]
    # The last of them may stall for less: what follows doesn't need it.
    assert LATENCY * (FFMAS - 1) < clocks <= LATENCY * FFMAS + 24
    long = [one.stall for one in code[first : last + 1] if one.opcode == "FFMA"]
    assert sum(stall == LATENCY for stall in long) >= FFMAS - 8


@pytest.mark.parametrize(("capability", "least"), [(80, 1), (86, 1), (90, 1)])
def test_independent_ffmas_follow_one_another(capability, least):
    code, (first, last) = chains(8, capability)
    clocks = sass.stalls_to(code, last)[first]
    assert least * FFMAS <= clocks < 2.5 * FFMAS


def test_a_way_is_the_shortest_one():
    """A branch around ten FFMAs: the way that takes it has fewer stalls; what nobody reaches has
    none."""
    code = [
        sass.Instruction(0x00, "ISETP.NE.AND P0, PT, R0, RZ, PT", 5, 0),
        sass.Instruction(0x10, "@P0 BRA 0x40", 2, 0),
        sass.Instruction(0x20, "FFMA R1, R1, R1, R1", 4, 0),
        sass.Instruction(0x30, "FFMA R1, R1, R1, R1", 4, 0),
        sass.Instruction(0x40, "STG.E [R2.64], R1", 1, 0),
        sass.Instruction(0x50, "EXIT", 5, 0),
        sass.Instruction(0x60, "NOP", 1, 0),
    ]
    assert sass.stalls_to(code, 4) == {4: 0, 3: 4, 2: 8, 1: 2, 0: 7}
    assert sass.following(code)[1] == [2, 4]
    assert sass.following(code)[5] == []


def test_a_word_is_read():
    text = (
        "        /*0010*/              @!P0 FFMA R1, R2, R3, R4 ;     /* 0x0000000302017223 */\n"
        "                                                            /* 0x020fc80000000004 */\n"
    )
    (one,) = sass.read(text)
    assert (one.address, one.opcode, one.predicated, one.target) == (16, "FFMA", True, None)
    assert (one.stall, one.waits) == (0x020FC80000000004 >> 41 & 15, 0x020FC80000000004 >> 52 & 63)


def test_without_products_there_is_no_main_loop():
    code, _ = chains(1, 80)
    with pytest.raises(ValueError, match="no loop multiplies"):
        sass.schedule(code)


def test_what_ptxas_refuses_is_said():
    with pytest.raises(RuntimeError, match="ptxas refuses a module for sm_80"):
        sass.compiled(".version 8.0\n.target sm_80\n.address_size 64\nno\n", 80)
