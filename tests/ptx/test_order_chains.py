"""Orders of several links: they compose, by whatever CTA they go, and no link may be missing.

PTX ISA, Memory Consistency Model: base causality is transitive.
"""

import numpy as np
import pytest

from ptx import In, InOut
from ptx.handwritten import fault_of, kernel, launch, numbers

SEEDS = range(20)
MEETS = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"


def spin(label, load, at):
    return f"{label}: {load} %r4, [{at}]; setp.eq.u32 %p3, %r4, 0; @%p3 bra {label};"


def arguments():
    zeros = np.zeros(32, np.uint32)
    return [
        InOut("data", zeros.copy()),
        InOut("flag", zeros[:2].copy()),
        In("x", numbers(32)),
        InOut("y", zeros.copy()),
    ]


def program(body, cluster=1):
    """``%q1``, ``%q2``, ``%q3``, ``%r9``: a lane's word of data, x, y and shared memory. ``%p1``: of
    another CTA than 0; ``%p2``: of warp 0; ``%p4``: no first lane of its warp."""
    if cluster > 1:  # shared memory of a CTA that has ended is nobody's
        body += MEETS
    head = """
    mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r1, 0; setp.eq.u32 %p2, %warp, 0; mov.u32 %r9, smem;
    and.b32 %r2, %tid, 31; setp.ne.u32 %p4, %r2, 0; mad.wide.u32 %q1, %r2, 4, %data;
    mad.wide.u32 %q2, %r2, 4, %x; mad.wide.u32 %q3, %r2, 4, %y; mad.lo.u32 %r9, %r2, 4, %r9;
    """
    return kernel(head + body, "data flag x y")


def works(text, **options):
    for seed in SEEDS:
        given = arguments()
        launch(text, given, seed=seed, **options)
        np.testing.assert_array_equal(given[-1].array, given[-2].array)


def faults(text, **options):
    said = [fault_of(lambda: launch(text, arguments(), seed=seed, **options)) for seed in SEEDS]  # noqa: B023
    return [fault for fault in said if fault]


def line_of(text, code):
    (line,) = [i for i, line in enumerate(text.split("\n"), 1) if code in line]
    return line


# ---- A to B to A: warp 0 of CTA 0 stores and asks, CTA 1 answers, warp 1 of CTA 0 waits, and reads

THERE_AND_BACK = """
    @%p1 bra ANSWER;
    @!%p2 bra BACK;
    ld.global.u32 %r3, [%q2];
    {store}
    bar.warp.sync -1;
    @!%p4 {asks}
    {late}
    bra END;
ANSWER:
    @!%p2 bra END;
    @%p4 bra END;
    {asked}
    {answers}
    bra END;
BACK:
    @%p4 bra KNOWN;
    {answered}
KNOWN:
    bar.warp.sync -1;
    {load} // READ
    st.global.u32 [%q3], %r3;
END:
"""
LINKED = {
    "asks": "st.release.gpu.global.u32 [%flag], 1;",
    "asked": spin("ASKED", "ld.acquire.gpu.global.u32", "%flag"),
    "answers": "st.release.gpu.global.u32 [%flag+4], 1;",
    "answered": spin("ANSWERED", "ld.acquire.gpu.global.u32", "%flag+4"),
    "late": "",
}
MEMORY = {
    "global": {"store": "st.global.u32 [%q1], %r3;", "load": "ld.global.u32 %r3, [%q1];"},
    "shared": {"store": "st.shared.u32 [%r9], %r3;", "load": "ld.shared.u32 %r3, [%r9];"},
}


def there_and_back(memory, cluster, parts):
    of = {**MEMORY[memory], **LINKED, **parts}
    if "late" in parts:
        of["store"], of["late"] = "", of["store"]
    if cluster > 1:
        of = {name: part.replace(".gpu", ".cluster") for name, part in of.items()}
    return program(THERE_AND_BACK.format(**of), cluster)


RIGHT = {
    "releases and acquires": {},
    "atomics": {
        "asks": "red.release.gpu.global.add.u32 [%flag], 1;",
        "answers": "atom.acq_rel.gpu.global.add.u32 %r5, [%flag+4], 1;",
    },
    "fences on the way": {
        "asked": spin("ASKED", "ld.relaxed.gpu.global.u32", "%flag"),
        "answers": "fence.acq_rel.gpu;\nst.relaxed.gpu.global.u32 [%flag+4], 1;",
    },
    "fences at both ends": {
        "asks": "fence.acq_rel.gpu;\n@!%p4 st.relaxed.gpu.global.u32 [%flag], 1;",
        "answered": spin("ANSWERED", "ld.relaxed.gpu.global.u32", "%flag+4")
        + "\nfence.acq_rel.gpu;",
    },
}
BROKEN = {
    "a relaxed question": {"asks": "st.relaxed.gpu.global.u32 [%flag], 1;"},
    "a question that is not acquired": {"asked": spin("ASKED", "ld.relaxed.gpu.u32", "%flag")},
    "a relaxed answer": {"answers": "st.relaxed.gpu.global.u32 [%flag+4], 1;"},
    "a fence that only releases the answer": {
        "asked": spin("ASKED", "ld.relaxed.gpu.global.u32", "%flag"),
        "answers": "fence.release.gpu;\nst.relaxed.gpu.global.u32 [%flag+4], 1;",
    },
    "an answer that is not acquired": {"answered": spin("ANSWERED", "ld.relaxed.gpu.u32", "%flag+4")},
    "a question of the CTA": {"asks": "st.release.cta.global.u32 [%flag], 1;"},
    "an answer of the CTA": {"answers": "st.release.cta.global.u32 [%flag+4], 1;"},
    "an answer acquired in the CTA": {"answered": spin("ANSWERED", "ld.acquire.cta.u32", "%flag+4")},
    "data behind the question": {"late": "stored here"},
}  # fmt: skip


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("what", RIGHT)
def test_an_order_goes_by_another_cta_and_back(what, cluster, memory):
    works(there_and_back(memory, cluster, RIGHT[what]), grid=2, cluster=cluster)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("what", BROKEN)
def test_a_chain_with_a_broken_link_is_a_fault(what, cluster, memory):
    text = there_and_back(memory, cluster, BROKEN[what])
    found = faults(text, grid=2, cluster=cluster)
    assert len(found) == len(SEEDS) or (found and "late" in BROKEN[what])
    at = line_of(text, "// READ")
    for fault in found:
        if " CTA" in what:
            assert "in a scope that does not include it" in fault
        elif "undefined" not in fault:  # data behind the question
            assert f"line {at}: CTA (0" in fault
            assert "with no barrier between" in fault


# ---- A to B to C

ON = """
    setp.eq.u32 %p5, %r1, 1; setp.eq.u32 %p6, %r1, 2;
    @!%p2 bra END;
    @%p5 bra MIDDLE;
    @%p6 bra LAST;
    ld.global.u32 %r3, [%q2];
    st.global.u32 [%q1], %r3;
    bar.warp.sync -1;
    @!%p4 st.release.gpu.global.u32 [%flag], 1;
    bra END;
MIDDLE:
    @%p4 bra END;
    {asked}
    {answers}
    bra END;
LAST:
    @%p4 bra KNOWN;
    {answered}
KNOWN:
    bar.warp.sync -1;
    ld.global.u32 %r3, [%q1]; // READ
    st.global.u32 [%q3], %r3;
END:
"""


def test_an_order_goes_by_a_second_cta_to_a_third():
    works(program(ON.format(**LINKED)), grid=3)


@pytest.mark.parametrize("link", ["asked", "answers", "answered"])
def test_a_relaxed_link_on_the_way_to_a_third_cta_is_a_fault(link):
    weak = LINKED[link].replace("release", "relaxed").replace("acquire", "relaxed")
    text = program(ON.format(**LINKED | {link: weak}))
    found = faults(text, grid=3)
    assert len(found) == len(SEEDS)
    for fault in found:
        assert f"line {line_of(text, '// READ')}: CTA (2" in fault
        assert "and this warp has not acquired" in fault


# ---- What a release does not tell: it is one warp's, not its CTA's

OTHER = """
    @%p1 bra READS;
    @!%p2 bra OTHER;
    ld.global.u32 %r3, [%q2];
    {data}
    bra END;
OTHER:
    @%p4 bra END;
    {sees}
    {raises}
    bra END;
READS:
    @!%p2 bra END;
    @%p4 bra KNOWN;
    ANSWERED: ld.acquire.gpu.global.u32 %r4, [%flag+4]; setp.eq.u32 %p3, %r4, 0; @%p3 bra ANSWERED;
KNOWN:
    bar.warp.sync -1;
    ld.global.u32 %r3, [%q1]; // READ
    st.global.u32 [%q3], %r3;
END:
"""
ANOTHERS = {
    "data": "st.global.u32 [%q1], %r3; bar.warp.sync -1; @!%p4 st.release.gpu.global.u32 [%flag], 1;",
    "sees": spin("SEES", "ld.acquire.gpu.global.u32", "%flag"),
    "raises": "st.release.gpu.global.u32 [%flag+4], 1;",
}
UNSEEN = {
    "by another warp that has seen it relaxed": {
        "sees": spin("SEES", "ld.relaxed.gpu.global.u32", "%flag")
    },
    "by a fence of another warp before it has seen it": {
        "sees": "fence.acq_rel.gpu;\n" + spin("SEES", "ld.relaxed.gpu.global.u32", "%flag"),
        "raises": "st.relaxed.gpu.global.u32 [%flag+4], 1;",
    },
    "by a fence before the data": {
        "data": "fence.acq_rel.gpu;\n"
        + ANOTHERS["data"]
        + "\n@!%p4 st.relaxed.gpu.global.u32 [%flag+4], 1;",
        "sees": "",
        "raises": "",
    },
}


def test_another_warp_that_has_acquired_releases_it_too():
    works(program(OTHER.format(**ANOTHERS)), grid=2)


@pytest.mark.parametrize("what", UNSEEN)
def test_what_was_released_is_not_released_again(what):
    """Data that one flag stands for, read after another flag that does not."""
    text = program(OTHER.format(**ANOTHERS | UNSEEN[what]))
    found = faults(text, grid=2)
    assert len(found) == len(SEEDS)
    for fault in found:
        assert f"line {line_of(text, '// READ')}: CTA (1" in fault
        assert "and this warp has not acquired" in fault


# ---- Of one warp: a lane releases what it has stored itself, not what others have since they met

LANES = """
    @%p1 bra END;
    @!%p2 bra READS;
    setp.eq.u32 %p5, %r2, 0;
    ld.global.u32 %r3, [%q2];
    st.global.u32 [%q1], %r3;
    {meet}
    @%p5 st.release.{scope}.global.u32 [%flag], 1;
    bra END;
READS:
    @%p4 bra KNOWN;
    SEES: ld.acquire.{scope}.global.u32 %r4, [%flag]; setp.eq.u32 %p3, %r4, 0; @%p3 bra SEES;
KNOWN:
    bar.warp.sync -1;
    ld.global.u32 %r3, [%q1]; // READ
    st.global.u32 [%q3], %r3;
END:
"""


@pytest.mark.parametrize("scope", ["cta", "cluster", "gpu"])
def test_lanes_meet_before_one_of_them_releases(scope):
    works(program(LANES.format(meet="bar.warp.sync -1;", scope=scope)), grid=1)


@pytest.mark.parametrize("scope", ["cta", "cluster", "gpu"])
def test_lanes_that_have_not_met_who_releases_are_not_released(scope):
    text = program(LANES.format(meet="", scope=scope))
    found = faults(text, grid=1)
    assert len(found) == len(SEEDS)
    assert all(f"line {line_of(text, '// READ')}: CTA (0" in fault for fault in found)
