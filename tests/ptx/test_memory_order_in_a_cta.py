"""Who sees what within a CTA: messages between its warps and lanes, and every way to get them wrong."""

import re

import numpy as np
import pytest

from ptx import In, InOut, Out
from ptx.handwritten import kernel, launch, numbers
from ptx.seeds import SEEDS, faults, lines

SHARED = """
    setp.ne.u32 %p1, %warp, 0; setp.eq.u32 %p2, %tid, 0; setp.eq.u32 %p3, %tid, 32;
    mov.u32 %r1, smem; and.b32 %r2, %tid, 31; mad.lo.u32 %r1, %r2, 4, %r1;
    mad.wide.u32 %q1, %r2, 4, %x; mad.wide.u32 %q2, %r2, 4, %y;
    @%p2 st.shared.u32 [smem+256], 0;
    bar.sync 0;
    @%p1 bra CONSUMER;
    ld.global.u32 %r3, [%q1];
    st.shared.u32 [%r1], %r3; // DATA
    {raises}
    bra END;
CONSUMER:
    {wait}
    ld.shared.u32 %r4, [%r1]; // READ
    st.global.u32 [%q2], %r4;
END:
"""
FLAG = "@!%p3 bra GO;\nLOOP: ld.{} %r5, [smem+256]; setp.eq.u32 %p4, %r5, 0; @%p4 bra LOOP;\n{}\nGO: {}"
MEET = "bar.warp.sync -1;"


def polls(load, fence="", met=MEET):
    return FLAG.format(load, fence, met)


def within(raises, wait):
    def make():
        return [In("x", numbers(32)), Out("y", np.zeros(32, np.uint32))]

    return kernel(SHARED.format(raises=raises, wait=wait), "x y"), make


RAISES = MEET + "\n@%p2 st.release.cta.shared.u32 [smem+256], 1;"
ACQUIRES = polls("acquire.cta.shared.u32")
SHARED_RIGHT = {
    "a barrier": ("bar.sync 1;", "bar.sync 1;"),
    "a barrier that one side only arrives at": ("bar.arrive 1, 64;", "bar.sync 1, 64;"),
    "release and acquire": (RAISES, ACQUIRES),
    "atomics": (
        RAISES.replace(
            "st.release.cta.shared.u32 [smem+256]",
            "atom.release.cta.shared.exch.b32 %r6, [smem+256]",
        ),
        ACQUIRES,
    ),
    "fences and volatile": (
        MEET + "\n@%p2 membar.cta; @%p2 st.volatile.shared.u32 [smem+256], 1;",
        polls("volatile.shared.u32", "membar.cta;"),
    ),
}
SHARED_WEAK = {
    "no barrier": ("", ""),
    "different barriers": ("bar.arrive 1, 64;", "bar.arrive 2, 64;"),
    "a relaxed store": (RAISES.replace("release", "relaxed"), ACQUIRES),
    "a plain store": (RAISES.replace(".release.cta", ""), ACQUIRES),
    "a relaxed load": (RAISES, polls("relaxed.cta.shared.u32")),
    "a plain load": (RAISES, polls("shared.u32")),
    "no fence": (
        MEET + "\n@%p2 st.volatile.shared.u32 [smem+256], 1;",
        polls("volatile.shared.u32", "membar.cta;"),
    ),
    "lanes that have not met behind the acquire": (
        RAISES,
        polls("acquire.cta.shared.u32", met="mov.u32 %r9, 0;"),
    ),
    "no wait": (RAISES, ""),
}


@pytest.mark.parametrize("what", SHARED_RIGHT)
def test_a_message_through_shared_memory_arrives(what):
    text, make = within(*SHARED_RIGHT[what])
    for seed in SEEDS:
        arguments = make()
        launch(text, arguments, seed=seed)
        np.testing.assert_array_equal(arguments[1].array, arguments[0].array)


@pytest.mark.parametrize("what", SHARED_WEAK)
def test_a_message_through_shared_memory_that_is_not_ordered_is_a_fault(what):
    text, make = within(*SHARED_WEAK[what])
    found = faults(text, make)
    assert found
    seen = lines(text, "DATA") + lines(text, "READ") + lines(text, "[smem+256]")
    for fault in found:
        both = re.search(r"line (\d+): CTA .*? line (\d+)", fault)
        # Who reads too early may also find that nobody has written.
        assert (both and set(map(int, both.groups())) <= set(seen)) or "undefined value" in fault, (
            fault
        )


def test_lanes_meet_before_they_read_each_others():
    code = """mov.u32 %r1, smem; mad.lo.u32 %r1, %tid, 4, %r1; xor.b32 %r3, %r1, 4;
        st.shared.u32 [%r1], %tid; // DATA
        {}
        ld.shared.u32 %r4, [%r3]; // READ
        mad.wide.u32 %q1, %tid, 4, %y; st.global.u32 [%q1], %r4;"""
    make = lambda: [Out("y", np.zeros(64, np.uint32))]  # noqa: E731
    for seed in SEEDS:
        (y,) = make()
        launch(kernel(code.format(MEET), "y"), [y], seed=seed)
        assert y.array.tolist() == [i ^ 1 for i in range(64)]
    # Neither do shuffles and votes order memory.
    for meet in ("", "vote.sync.any.pred %p1, %p0, -1;", "shfl.sync.idx.b32 %r5, %tid, 0, 31, -1;"):
        text = kernel("setp.eq.u32 %p0, %tid, 0;" + code.format(meet), "y")
        found = faults(text, make)
        assert found
        for fault in found:
            assert f"line {lines(text, 'READ')[0]}: " in fault
            assert f"writes in line {lines(text, 'DATA')[0]}, with no __syncwarp between" in fault


def test_lanes_meet_before_they_read_each_others_global_memory():
    code = """mad.wide.u32 %q1, %tid, 4, %y; xor.b64 %q2, %q1, 4; add.u32 %r1, %tid, 1;
        st.global.u32 [%q1], %r1; // DATA
        {}
        ld.global.u32 %r2, [%q2]; // READ
        st.global.u32 [%q1+256], %r2;"""
    for seed in SEEDS:
        y = numbers(128)
        launch(kernel(code.format(MEET), "y"), [InOut("y", y)], seed=seed)
        assert y[64:].tolist() == [1 + (i ^ 1) for i in range(64)]
    text = kernel(code.format("membar.gl;"), "y")
    found = faults(text, lambda: [InOut("y", numbers(128))])
    data, read = lines(text, "DATA")[0], lines(text, "READ")[0]
    assert found
    for fault in found:
        assert re.search(rf"line {read}: .* y\[\d+\], which lane \d+ of its warp stores to", fault)
        assert f"in line {data}, with no __syncwarp between" in fault


HISTOGRAM = """
    setp.lt.u32 %p1, %tid, 16; mov.u32 %r1, smem;
    mad.lo.u32 %r2, %tid, 4, %r1; mad.wide.u32 %q2, %tid, 4, %y;
    @%p1 st.shared.u32 [%r2], 0;
    {first}
    mad.wide.u32 %q1, %tid, 4, %x; ld.global.u32 %r3, [%q1];
    and.b32 %r3, %r3, 15; mad.lo.u32 %r3, %r3, 4, %r1;
    red.shared.add.u32 [%r3], 1;
    {second}
    @%p1 ld.shared.u32 %r4, [%r2];
    @%p1 st.global.u32 [%q2], %r4;
"""


def test_a_histogram_in_shared_memory():
    x = numbers(128)
    make = lambda: [In("x", x), Out("y", np.zeros(16, np.uint32))]  # noqa: E731
    barriers = {"first": "bar.sync 0;", "second": "bar.sync 0;"}
    for seed in SEEDS:
        arguments = make()
        launch(kernel(HISTOGRAM.format(**barriers), "x y"), arguments, threads=128, seed=seed)
        np.testing.assert_array_equal(arguments[1].array, np.bincount(x & 15, minlength=16))
    both = r"line \d+: CTA .* warp \d (writes|reads) in line \d+, with no barrier between"
    for missing in barriers:
        text = kernel(HISTOGRAM.format(**{**barriers, missing: ""}), "x y")
        found = faults(text, make, threads=128)
        assert any(re.search(both, fault) for fault in found)
