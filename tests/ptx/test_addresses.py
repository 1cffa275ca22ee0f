"""Addresses of one state space in another, and hints to caches."""

import re

import numpy as np
import pytest

from ptx import Fault, In, InOut, Out, UnknownInstruction
from ptx.handwritten import kernel, launch, numbers


def test_isspacep():
    spaces = ("const", "global", "shared", "shared::cta", "shared::cluster", "local", "param")
    addresses = {
        "x": ("mov.u64 %q1, %x;", {"global"}),
        "smem": (
            "mov.u64 %q1, smem; cvta.shared.u64 %q1, %q1;",
            {"shared", "shared::cta", "shared::cluster"},
        ),
        "table": ("mov.u64 %q1, table; cvta.const.u64 %q1, %q1;", {"const"}),
        "own": ("mov.u64 %q1, own; cvta.local.u64 %q1, %q1;", {"local"}),
        "p_x": ("mov.b64 %q1, p_x; cvta.param.u64 %q1, %q1;", {"param", "global"}),
        "another CTA": (
            "mov.u64 %q1, smem; cvta.shared.u64 %q1, %q1; mapa.u64 %q1, %q1, 1;",
            {"shared::cluster"},
        ),
    }
    y = np.full(len(spaces) * len(addresses), 9, np.uint8)
    body, expected = [], []
    for address, inside in addresses.values():
        body.append(address)
        for space in spaces:
            body.append(
                f"isspacep.{space} %p1, %q1; selp.u32 %r2, 1, 0, %p1;"
                f"st.global.u8 [%y+{len(expected)}], %r2;"
            )
            expected.append(space in inside)
    body = [
        "setp.eq.u32 %p2, %rank, 0; @!%p2 bra END;",
        *body,
        "END: barrier.cluster.arrive; barrier.cluster.wait;",
    ]
    text = kernel("\n".join(body), "x y", registers=".local .b8 own[16];")
    text = text.replace(".visible", ".const .b8 table[4] = {1, 2, 3, 4};\n.visible")
    launch(text, [In("x", np.zeros(4)), InOut("y", y)], threads=1, grid=2, cluster=2)
    assert y.tolist() == expected


@pytest.mark.parametrize("space", ["shared", "local", "param", "global"])
def test_cvta_there_and_back(space):
    # Back to where it isn't gives no value, which is a fault where it is used.
    name = {"shared": "smem", "local": "own", "param": "p_y", "global": "%y"}[space]
    y = np.zeros(1, np.uint64)
    code = f"""mov.u64 %q1, {name}; cvta.{space}.u64 %q2, %q1; cvta.to.{space}.u64 %q3, %q2;
        sub.u64 %q4, %q3, %q1; st.global.u64 [%y], %q4;"""
    registers = ".local .align 8 .b8 own[16];"
    launch(kernel(code, "y", registers=registers), [Out("y", y)], threads=1)
    assert y[0] == 0
    other = "local" if space == "shared" else "shared"
    wrong = kernel(code.replace(f"cvta.to.{space}", f"cvta.to.{other}"), "y", registers=registers)
    with pytest.raises(Fault, match="undefined value"):
        launch(wrong, [Out("y", y)], threads=1)


@pytest.mark.parametrize("generic", [False, True], ids=["shared::cluster", "generic"])
def test_shared_memory_of_the_cluster(generic):
    # Each of four CTAs writes to the next one and reads from the one after.
    prefix = "cvta.shared.u64 %q1, %q1;" if generic else ""
    where, maps = ("", "mapa.u64") if generic else (".shared::cluster", "mapa.shared::cluster.u64")
    rank = "getctarank.u64" if generic else "getctarank.shared::cluster.u64"
    text = kernel(
        f"""mov.u64 %q1, smem; {prefix}
        add.u32 %r1, %rank, 1; and.b32 %r1, %r1, 3; add.u32 %r2, %rank, 2; and.b32 %r2, %r2, 3;
        {maps} %q2, %q1, %r1; {maps} %q3, %q1, %r2;
        {rank} %r3, %q2; setp.ne.u32 %p1, %r3, %r1; @%p1 trap;
        mad.wide.u32 %q2, %tid, 4, %q2; mad.wide.u32 %q3, %tid, 4, %q3;
        mad.lo.u32 %r4, %rank, 1000, %tid;
        st{where}.u32 [%q2], %r4;
        barrier.cluster.arrive; barrier.cluster.wait;
        ld{where}.u32 %r5, [%q3];
        mad.lo.u32 %r6, %rank, 64, %tid; mad.wide.u32 %q4, %r6, 4, %y; st.global.u32 [%q4], %r5;
        barrier.cluster.arrive; barrier.cluster.wait;""",
        "y",
    )
    for seed in range(4):
        y = np.zeros((4, 64), np.uint32)
        launch(text, [Out("y", y)], grid=4, cluster=4, seed=seed)
        # What lies in CTA r + 2 was written by r + 1.
        np.testing.assert_array_equal(y, 1000 * ((np.arange(4)[:, None] + 1) % 4) + np.arange(64))


def test_mapa_of_a_variable_and_of_a_cta_that_is_not_there():
    code = "mapa.shared::cluster.u32 %r1, smem, {}; st.shared::cluster.u32 [%r1+8], %tid;"
    launch(kernel(code.format(0), ""), [], threads=1)
    with pytest.raises(Fault, match="asks for CTA 1 of a cluster of 1"):
        launch(kernel(code.format(1), ""), [], threads=1)
    with pytest.raises(Fault, match="not in shared memory"):
        launch(kernel("mapa.u64 %q1, %y, 0;", "y"), [InOut("y", np.zeros(1))], threads=1)


def test_shared_cta_is_no_other_cta():
    code = """mov.u32 %r1, smem; xor.b32 %r2, %rank, 1; mapa.shared::cluster.u32 %r1, %r1, %r2;
        st.shared.u32 [%r1], %tid; barrier.cluster.arrive; barrier.cluster.wait;"""
    with pytest.raises(Fault, match="for an address in shared memory"):
        launch(kernel(code, ""), [], threads=1, grid=2, cluster=2)


def test_hints_change_nothing():
    x, y = numbers(4), np.zeros(4, np.uint32)
    text = kernel(
        """createpolicy.fractional.L2::evict_last.L2::evict_unchanged.b64 %q9, 0.5;
        createpolicy.fractional.L2::evict_first.b64 %q9;
        createpolicy.range.global.L2::evict_last.L2::evict_first.b64 %q9, [%x], 16, 32;
        createpolicy.cvt.L2.b64 %q9, %q9;
        prefetch.global.L2 [%x]; prefetch.L1 [%x]; prefetchu.L1 [%x];
        prefetch.global.L2::evict_last [%x];
        prefetch.tensormap [%x]; applypriority.global.L2::evict_normal [%x], 128;
        ld.global.ca.L2::cache_hint.L2::256B.u32 %r1, [%x], %q9;
        ld.weak.global.cv.u32 %r2, [%x+4];
        ld.L1::evict_unchanged.L2::evict_normal.u32 %r3, [%x+8];
        ld.global.nc.L1::no_allocate.L2::cache_hint.u32 %r4, [%x+12], %q9;
        st.global.wt.L2::cache_hint.u32 [%y], %r1, %q9;
        st.weak.global.L1::no_allocate.u32 [%y+4], %r2;
        st.cs.u32 [%y+8], %r3;
        st.global.L1::evict_first.L2::cache_hint.u32 [%y+12], %r4, %q9;""",
        "x y",
    )
    launch(text, [In("x", x), Out("y", y)], threads=1)
    np.testing.assert_array_equal(y, x)
    with pytest.raises(Fault, match="undefined value for an address"):
        launch(kernel("prefetch.global.L2 [%q1];", ""), [], threads=1)


REFUSED = """
    cvta.shared.u32 %r1, %r2
    cvta.u64 %q1, %q2
    cvta.local.u64 %q1, smem
    isspacep.global %r1, %q1
    isspacep.global %p1, %r1
    mapa.u32 %r1, %r2, 0
    mapa.shared::cluster.u32 %r1, %q2, 0
    getctarank.shared.u32 %r1, %r2
    prefetch.shared.L1 [%q1]
    prefetch.global.L3 [%q1]
    discard.global.L2 [%q1], 64
    applypriority.global.L2::evict_last [%q1], 128
    createpolicy.fractional.L1::evict_last.b64 %q1, 1.0
"""


@pytest.mark.parametrize("code", [line.strip() for line in REFUSED.strip().split("\n")])
def test_what_is_no_instruction_is_refused(code):
    text = kernel(f"{code};", "x", registers=".local .align 8 .b8 own[8];")
    with pytest.raises(UnknownInstruction, match=re.escape(code.split()[0])):
        launch(text, [In("x", np.zeros(64))], threads=1)
