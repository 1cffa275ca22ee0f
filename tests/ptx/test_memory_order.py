"""Who sees what: message passing between CTAs, and every way to get it wrong.

A program that orders its accesses works under every seed; one that doesn't is a fault in one of twenty.
"""

import re

import numpy as np
import pytest

from ptx import Fault, In, InOut, Out
from ptx.handwritten import fault_of, kernel, launch, numbers, waits
from ptx.seeds import SEEDS, always, faults, lines

# ---- Between two CTAs: all threads of one store, one raises a flag; all threads of the other read

PASSING = """
    mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r1, {producer}; setp.eq.u32 %p2, %tid, 0;
    mad.wide.u32 %q1, %tid, 4, %data; mad.wide.u32 %q2, %tid, 4, %x; mad.wide.u32 %q3, %tid, 4, %y;
    ld.global.u32 %r2, [%q2];
    @%p1 bra CONSUMER;
    {early}
    st.global.u32 [%q1], %r2; // DATA
    {fence}
    {meet}
    @%p2 {raises}
    bra END;
CONSUMER:
    {wait}
    {met}
    {fenced}
    xor.b64 %q1, %q1, {partner};
    ld.global.u32 %r3, [%q1]; // READ
    st.global.u32 [%q3], %r3;
END:
"""
SPIN = "@!%p2 bra GO;\nLOOP: {} %r4, [%flag]; setp.eq.u32 %p3, %r4, 0; @%p3 bra LOOP;\n{}\nGO:"


def spin(load, fence=""):
    return SPIN.format(load, fence)


WARPS = {
    "meet": "bar.sync 0;",
    "met": "bar.sync 0;",
    "partner": 128,
    "producer": 0,
    "early": "",
    "fence": "",
    "fenced": "",
}
LANES = {**WARPS, "meet": "bar.warp.sync -1;", "met": "bar.warp.sync -1;", "partner": 4}
ORDERED = {
    "raises": "st.release.gpu.global.u32 [%flag], 1;",
    "wait": spin("ld.acquire.gpu.global.u32"),
}
# In a row of 64 threads, xor 128 leads to another warp's word; in one of 32, xor 4 to another lane's.


def passing(threads, **parts):
    base = WARPS if threads == 64 else LANES
    text = kernel(PASSING.format(**{**base, **ORDERED, **parts}), "data flag x y")

    def make():
        data = np.zeros(128, np.uint32)
        start = -data.ctypes.data % 256 // 4
        return [
            InOut("data", data[start : start + 64]),
            InOut("flag", np.zeros(2, np.uint32)),
            In("x", numbers(64)[:threads]),
            Out("y", np.zeros(threads, np.uint32)),
        ]

    return text, make


def works(text, make, threads=64, lates=("late", "random", "soon"), **options):
    for seed in SEEDS:
        arguments = make()
        launch(
            text, arguments, seed=seed, threads=threads, late=lates[seed % len(lates)], **options
        )
        x, y = (a.array for a in arguments[-2:])
        np.testing.assert_array_equal(y, x[np.arange(threads) ^ (32 if threads == 64 else 1)])


RIGHT = {
    "release and acquire": {},
    "one lane released before": {"fence": "@%p2 st.release.gpu.global.u32 [%flag+4], 1;"},
    "of the system": {
        "raises": "st.release.sys.global.u32 [%flag], 1;",
        "wait": spin("ld.acquire.sys.global.u32"),
    },
    "an exchange": {"raises": "atom.global.release.gpu.exch.b32 %r5, [%flag], 1;"},
    "a reduction": {"raises": "red.release.gpu.global.add.u32 [%flag], 1;"},
    "polled by an atomic": {
        "wait": spin("atom.global.acquire.gpu.add.u32").replace("[%flag];", "[%flag], 0;")
    },
    "membar and volatile": {
        "raises": "membar.gl;\n@%p2 st.volatile.global.u32 [%flag], 1;",
        "wait": spin("ld.volatile.global.u32", "membar.gl;"),
    },
    "fences and relaxed accesses": {
        "raises": "fence.acq_rel.gpu;\n@%p2 st.relaxed.gpu.global.u32 [%flag], 1;",
        "wait": spin("ld.relaxed.gpu.global.u32", "fence.acq_rel.gpu;"),
    },
    "fences of one direction": {
        "raises": "fence.release.gpu;\n@%p2 st.relaxed.gpu.global.u32 [%flag], 1;",
        "wait": spin("ld.relaxed.gpu.global.u32", "fence.acquire.gpu;"),
    },
    "a fence and a release": {
        "raises": "fence.sc.gpu;\n@%p2 st.relaxed.gpu.global.u32 [%flag], 1;",
        "wait": spin("ld.acquire.gpu.global.u32"),
    },
    "fences of all threads": {
        "fence": "membar.gl;",
        "raises": "st.volatile.global.u32 [%flag], 1;",
        "wait": spin("ld.volatile.global.u32"),
        "fenced": "membar.gl;",
    },
    "generic addresses": {
        "raises": "st.release.gpu.u32 [%flag], 1;",
        "wait": spin("ld.acquire.gpu.u32"),
    },
}


@pytest.mark.parametrize("what", RIGHT)
@pytest.mark.parametrize("threads", [64, 32])
def test_a_message_arrives(what, threads):
    works(*passing(threads, **RIGHT[what]), threads=threads, grid=2)


def test_whoever_waits_for_a_cta_that_has_not_started_waits_for_ever():
    text, make = passing(64, producer=1)
    works(text, make, grid=2, resident=2)
    with pytest.raises(Fault, match=r"(?s)wait for ever.*CTAs that have not started: 1"):
        launch(text, make(), grid=2, resident=1)


WEAK = {
    "a relaxed store": {"raises": "st.relaxed.gpu.global.u32 [%flag], 1;"},
    "a volatile store": {"raises": "st.volatile.global.u32 [%flag], 1;"},
    "a plain store": {"raises": "st.global.u32 [%flag], 1;"},
    "a relaxed exchange": {"raises": "atom.global.relaxed.gpu.exch.b32 %r5, [%flag], 1;"},
    "a relaxed reduction": {"raises": "red.global.add.u32 [%flag], 1;"},
    "a release of the CTA": {"raises": "st.release.cta.global.u32 [%flag], 1;"},
    "a release of the cluster": {"raises": "st.release.cluster.global.u32 [%flag], 1;"},
    "a relaxed load": {"wait": spin("ld.relaxed.gpu.global.u32")},
    "a volatile load": {"wait": spin("ld.volatile.global.u32")},
    "a plain load": {"wait": spin("ld.global.u32")},
    "an acquire of the CTA": {"wait": spin("ld.acquire.cta.global.u32")},
    "an acquire of the cluster": {"wait": spin("ld.acquire.cluster.global.u32")},
    "no barrier before the release": {"meet": ""},
    "no barrier behind the acquire": {"met": ""},
    "a vote behind the acquire": {"met": "vote.sync.any.pred %p5, %p2, -1;"},
    "a vote before the release": {"meet": "vote.sync.any.pred %p5, %p2, -1;"},
    "raised before the data": {
        "early": "@%p2 st.release.gpu.global.u32 [%flag], 1;",
        "raises": "mov.u32 %r9, 0;",
    },
    "no wait": {"wait": ""},
    "another flag": {
        "wait": spin("ld.acquire.gpu.global.u32")
        .replace("GO:", "ld.acquire.gpu.global.u32 %r4, [%x];\nGO:")
        .replace("LOOP: ld.acquire", "LOOP: ld.relaxed")
    },
    "no fence before the store": {
        "raises": "st.volatile.global.u32 [%flag], 1;",
        "wait": spin("ld.volatile.global.u32", "membar.gl;"),
    },
    "no fence behind the load": {
        "raises": "membar.gl;\n@%p2 st.volatile.global.u32 [%flag], 1;",
        "wait": spin("ld.volatile.global.u32"),
    },
    "a fence of the CTA before the store": {
        "raises": "membar.cta;\n@%p2 st.volatile.global.u32 [%flag], 1;",
        "wait": spin("ld.volatile.global.u32", "membar.gl;"),
    },
    "a fence of the CTA behind the load": {
        "raises": "membar.gl;\n@%p2 st.volatile.global.u32 [%flag], 1;",
        "wait": spin("ld.volatile.global.u32", "membar.cta;"),
    },
    "a fence that only acquires before the store": {
        "raises": "fence.acquire.gpu;\n@%p2 st.relaxed.gpu.global.u32 [%flag], 1;",
    },
    "a fence that only releases behind the load": {
        "wait": spin("ld.relaxed.gpu.global.u32", "fence.release.gpu;")
    },
    "a fence behind the store": {
        "raises": "st.relaxed.gpu.global.u32 [%flag], 1;\n@%p2 fence.acq_rel.gpu;",
    },
    "fences of all threads, no barrier between": {
        "fence": "membar.gl;",
        "meet": "",
        "raises": "st.volatile.global.u32 [%flag], 1;",
        "wait": spin("ld.volatile.global.u32"),
        "fenced": "membar.gl;",
    },
    "plain accesses between fences": {
        "raises": "fence.acq_rel.gpu;\n@%p2 st.global.u32 [%flag], 1;",
        "wait": spin("ld.global.u32", "fence.acq_rel.gpu;"),
    },
}


@pytest.mark.parametrize("what", WEAK)
@pytest.mark.parametrize("threads", [64, 32])
def test_a_message_that_is_not_ordered_is_a_fault(what, threads):
    if threads == 32 and what == "fences of all threads, no barrier between":
        pytest.skip("the lanes of a warp have gone through the fence together")
    text, make = passing(threads, **WEAK[what])
    found = faults(text, make, threads=threads, grid=2)
    assert found
    for fault in found:
        reader, store = map(
            int, re.search(r"line (\d+): CTA .*line (\d+)", fault.split("\n")[0]).groups()
        )
        named = {reader, store}
        # The data and who reads it, or the flag and who polls it.
        assert named <= set(lines(text, "DATA") + lines(text, "READ") + lines(text, "[%flag]")), (
            fault
        )
        assert re.search(r"(data|flag)\[\d+\]", fault)


def test_a_fence_behind_a_barrier_acquires_for_others_only_if_it_is_sequentially_consistent():
    wait = spin("ld.relaxed.gpu.global.u32")
    works(*passing(64, wait=wait, fenced="fence.sc.gpu;"), grid=2)
    assert faults(*passing(64, wait=wait, fenced="fence.acq_rel.gpu;"), grid=2)


@pytest.mark.parametrize(
    ("cluster", "releases", "acquires", "right"),
    [
        (1, "gpu", "gpu", True),
        (1, "cluster", "cluster", False),
        (2, "gpu", "cluster", True),
        (2, "cluster", "cluster", True),
        (2, "cluster", "cta", False),
        (2, "cta", "cluster", False),
        (2, "cta", "cta", False),
    ],
)
def test_a_scope_must_include_both(cluster, releases, acquires, right):
    raises = f"st.release.{releases}.global.u32 [%flag], 1;"
    text, make = passing(64, raises=raises, wait=spin(f"ld.acquire.{acquires}.global.u32"))
    if right:
        works(text, make, grid=2, cluster=cluster)
    else:
        found = faults(text, make, grid=2, cluster=cluster)
        assert found
        assert all(re.search(r"(data|flag)\[\d+\], which .* in line \d+", f) for f in found)


# ---- The last of several CTAs adds up what all have stored

LAST = """
    mov.u32 %r1, %ctaid.x; mad.lo.u32 %r2, %r1, 64, %tid;
    mad.wide.u32 %q1, %r2, 4, %parts; mad.wide.u32 %q2, %tid, 4, %parts;
    mad.wide.u32 %q3, %tid, 4, %y; mad.wide.u32 %q4, %tid, 4, %sums;
    st.global.u32 [%q1], %r2;
    red.global.add.u32 [%q4], %r2;
    {meet}
    setp.ne.u32 %p1, %tid, 0; @%p1 bra MEET;
    atom.global.{order}.inc.u32 %r3, [%count], 3;
    st.shared.u32 [smem], %r3;
MEET:
    {met}
    ld.shared.u32 %r3, [smem]; setp.ne.u32 %p2, %r3, 3; @%p2 bra END;
    ld.global.u32 %r4, [%q2]; ld.global.u32 %r5, [%q2+256];
    ld.global.u32 %r6, [%q2+512]; ld.global.u32 %r7, [%q2+768];
    add.u32 %r4, %r4, %r5; add.u32 %r6, %r6, %r7; add.u32 %r4, %r4, %r6;
    ld.global.u32 %r8, [%q4];
    setp.ne.u32 %p3, %r8, %r4; @%p3 trap;
    st.global.u32 [%q3], %r4;
END:
"""
ADDED = {"meet": "bar.sync 0;", "met": "bar.sync 0;", "order": "acq_rel.gpu"}


def last(**parts):
    def make():
        zeros = np.zeros(64, np.uint32)
        return [
            InOut("parts", np.zeros(256, np.uint32)),
            InOut("sums", zeros),
            InOut("count", np.zeros(1, np.uint32)),
            Out("y", zeros.copy()),
        ]

    return kernel(LAST.format(**{**ADDED, **parts}), "parts sums count y"), make


@pytest.mark.parametrize("resident", [1, 2, 4])
def test_the_last_arriver_sees_all(resident):
    text, make = last()
    for seed in SEEDS:
        arguments = make()
        launch(text, arguments, grid=4, seed=seed, resident=resident)
        assert (arguments[-1].array == 4 * np.arange(64) + 64 * 6).all()
        assert arguments[2].array[0] == 0


@pytest.mark.parametrize(
    "parts",
    [
        {"order": "relaxed.gpu"},
        {"order": "acquire.gpu"},
        {"order": "release.gpu"},
        {"order": "acq_rel.cta"},
        {"meet": ""},
        {"met": ""},
    ],
    ids=str,
)
def test_a_last_arriver_that_may_miss_some(parts):
    text, make = last(**parts)
    found = faults(text, make, grid=4)
    assert found
    for fault in found:
        assert re.search(r"line \d+: CTA .*(line \d+|undefined)", fault)


# ---- Between proxies: a fence is for the memory that it names

TO_GLOBAL = """st.shared.v4.u32 [smem], {{%r9, %r9, %r9, %r9}};
    fence.proxy.async{};
    cp.async.bulk.global.shared::cta.bulk_group [%y], [smem], 16;
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;"""
TO_SHARED = f"""mov.u32 %r0, smem; mbarrier.init.shared::cta.b64 [%r0], 1;
    st.global.v4.u32 [%y], {{{{%r9, %r9, %r9, %r9}}}};
    fence.proxy.async.shared::cta; fence.proxy.async{{}};
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0], 16;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r0+16], [%y], 16, [%r0];
    {waits("%r0", 0)}"""


@pytest.mark.parametrize(("code", "other"), [(TO_GLOBAL, ".global"), (TO_SHARED, ".shared::cta")])
def test_a_proxy_fence_is_for_the_memory_that_it_names(code, other):
    right = {"", ".global", ".shared::cta"} - {other}
    for space in right:
        y = numbers(4)
        text = kernel("mov.u32 %r9, 7;\n" + code.format(space), "y")
        launch(text, [InOut("y", y)], threads=1)
        assert y.tolist() == [7, 7, 7, 7]
    text = kernel("mov.u32 %r9, 7;\n" + code.format(other), "y")
    found = faults(text, lambda: [InOut("y", numbers(4))], threads=1)
    assert found
    store = lines(text, "st.shared" if code is TO_GLOBAL else "st.global")[0]
    for fault in found:
        assert re.search(f"line {store} .*, with no fence.proxy.async between", fault)


def test_spinning_on_what_nobody_changes_ends():
    for poll in (
        "ld.acquire.gpu.global.u32 %r1, [%flag]",
        "ld.volatile.global.u32 %r1, [%flag]",
        "atom.global.add.u32 %r1, [%flag], 0",
        "atom.global.cas.b32 %r1, [%flag], 5, 6",
        "ld.acquire.cta.shared.u32 %r1, [smem]",
        "atom.shared.or.b32 %r1, [smem], 0",
    ):
        code = f"st.shared.u32 [smem], 0;\nLOOP: {poll}; setp.eq.u32 %p1, %r1, 0; @%p1 bra LOOP;"
        with pytest.raises(
            Fault,
            match=r"(?s)nothing has changed for .* steps: those who spin wait .* 1 thread at line",
        ):
            launch(kernel(code, "flag"), [InOut("flag", np.zeros(1, np.uint32))], threads=1)


# ---- What the record of an access must hold


def on_two_ctas(first, second):
    """The faults of a kernel whose CTAs run a part each, one thread in each."""
    code = f"""mov.u32 %r0, %ctaid.x; setp.eq.u32 %p0, %r0, 0; @!%p0 bra SECOND;
        {first}
        bra END;
        SECOND: {second}
        END:"""
    text = kernel(code, "data flag y")

    def make():
        return [InOut("data", numbers(4)), InOut("flag", np.zeros(1, np.uint32)),
                InOut("y", np.zeros(1, np.uint32))]  # fmt: skip

    return [
        fault_of(lambda seed=seed: launch(text, make(), threads=1, grid=2, seed=seed))
        for seed in SEEDS
    ]


def test_all_bytes_of_a_store_are_released_whatever_was_stored_at_its_ends():
    found = on_two_ctas(
        """st.global.u32 [%data], 1; st.global.u32 [%data+12], 1;
        st.global.v4.u32 [%data], {2, 2, 2, 2}; st.release.gpu.global.u32 [%flag], 1;""",
        """LOOP: ld.acquire.gpu.global.u32 %r1, [%flag]; setp.eq.u32 %p1, %r1, 0; @%p1 bra LOOP;
        ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%data]; st.global.u32 [%y], %r2;""",
    )
    assert set(found) == {None}


def test_shared_memory_of_another_cluster_has_the_same_addresses_and_says_nothing():
    found = on_two_ctas(
        """st.global.u32 [%data], 1; st.release.gpu.shared.u32 [smem], 1;
        st.relaxed.gpu.global.u32 [%flag], 1;""",
        """st.relaxed.gpu.shared.u32 [smem], 1;
        LOOP: ld.relaxed.gpu.global.u32 %r1, [%flag]; setp.eq.u32 %p1, %r1, 0; @%p1 bra LOOP;
        ld.acquire.gpu.shared.u32 %r1, [smem]; ld.global.u32 %r2, [%data]; st.global.u32 [%y], %r2;""",
    )
    assert all(fault and "CTA 0 stores to" in fault for fault in found)


def test_a_strong_access_does_not_touch_what_a_copy_may_be_writing():
    code = """mov.u32 %r0, smem; st.volatile.shared.u32 [%r0], 1;
        cp.async.ca.shared.global [%r0], [%x], 4;
        {} ld.volatile.shared.u32 %r1, [%r0]; st.global.u32 [%y], %r1; cp.async.wait_all;"""
    x, y = numbers(1), np.zeros(1, np.uint32)
    text = kernel(code.format("cp.async.wait_all;"), "x y")
    launch(text, [In("x", x), Out("y", y)], threads=1, late="late")
    assert y[0] == x[0]
    with pytest.raises(Fault, match="asynchronous, may still be writing"):
        launch(kernel(code.format(""), "x y"), [In("x", x), Out("y", y)], threads=1)


# Two warps, an mbarrier at the start of ``smem``, a word of each lane
ALONE = """
    mov.u32 %r0, smem; setp.eq.u32 %p0, %tid, 0; setp.eq.u32 %p1, %tid, 32; setp.lt.u32 %p2, %tid, 32;
    @%p0 mbarrier.init.shared::cta.b64 [%r0], 1;
    bar.sync 0;
    and.b32 %r1, %tid, 31; mad.lo.u32 %r2, %r1, 4, %r0;
    {code}
END:"""


def test_a_phase_that_one_lane_has_waited_for_is_known_to_lanes_that_meet_it():
    code = """@%p2 bra CONSUMER;
        st.shared.u32 [%r2+256], %tid; // DATA
        bar.warp.sync -1;
        @%p1 mbarrier.arrive.shared::cta.b64 _, [%r0];
        bra END;
        CONSUMER: @!%p0 bra GO;
        {wait}
        GO: {met}
        ld.shared.u32 %r3, [%r2+256];
        mad.wide.u32 %q1, %tid, 4, %y; st.global.u32 [%q1], %r3;"""
    wait = waits("%r0", 0)
    text = kernel(ALONE.format(code=code.format(wait=wait, met="bar.warp.sync -1;")), "y")
    for seed in SEEDS:
        y = np.zeros(32, np.uint32)
        launch(text, [Out("y", y)], seed=seed)
        assert y.tolist() == list(range(32, 64))
    text = kernel(ALONE.format(code=code.format(wait=wait, met="")), "y")
    for fault in always(text, lambda: [Out("y", np.zeros(32, np.uint32))]):
        data = lines(text, "DATA")[0]
        assert re.search(rf"line {data}\b.* with no barrier between|an undefined value", fault)


def test_lanes_that_have_not_met_who_arrives_may_still_read_either_half_of_a_word():
    code = """@!%p2 bra WRITER;
        setp.eq.u32 %p3, %tid, 1; setp.eq.u32 %p4, %tid, 2;
        @%p3 ld.shared.u16 %h1, [%r0+64];
        @%p4 ld.shared.u16 %h1, [%r0+66];
        {met}
        @%p0 mbarrier.arrive.shared::cta.b64 _, [%r0];
        bra END;
        WRITER: {wait}
        @%p1 st.shared.u16 [%r0+{half}], 1;"""
    wait = waits("%r0", 0)
    for half in (64, 66):
        parts = {"wait": wait, "half": half}
        launch(kernel(ALONE.format(code=code.format(met="bar.warp.sync -1;", **parts)), ""), [])
        text = kernel(ALONE.format(code=code.format(met="", **parts)), "")
        for fault in always(text, list):
            assert "writes shared memory at 64 that warp 0 reads" in fault


# What a lane asks for asynchronously, and what other lanes of its warp do before
BEHIND = {
    "a copy into what another lane reads": (
        """bar.warp.sync -1; ld.shared.u32 %r3, [%r2+256]; xor.b32 %r2, %r2, 4; {met}
        cp.async.ca.shared.global [%r2+256], [%x], 4; cp.async.wait_all;""",
        "writes shared memory at .* that another lane of its warp reads",
    ),
    "a bulk copy of what other lanes write": (
        """fence.proxy.async; {met}
        @%p0 cp.async.bulk.global.shared::cta.bulk_group [%y], [smem+256], 128;
        cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;""",
        "reads shared memory at .* that lane .* of its warp writes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BEHIND)
def test_lanes_meet_before_one_of_them_has_the_others_memory_copied(what):
    code, message = BEHIND[what]
    first = "st.shared.u32 [%r2+256], %tid; " + code
    text = kernel(ALONE.format(code=first.format(met="bar.warp.sync -1;")), "x y")
    make = lambda: [In("x", numbers(1)), InOut("y", numbers(32))]  # noqa: E731
    for seed in SEEDS:
        launch(text, make(), threads=32, seed=seed)
    text = kernel(ALONE.format(code=first.format(met="")), "x y")
    for fault in always(text, make, threads=32):
        assert re.search(message + ".*, with no __syncwarp between", fault)
