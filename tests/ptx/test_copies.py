"""cp.async: what arrives, when whoever may look, and what it costs."""

import re

import numpy as np
import pytest

from ptx import Fault, In, InOut, Out, UnknownInstruction
from ptx.handwritten import dumps, fault_of, kernel, launch, numbers

LATES = ("late", "random", "soon")
THREADS = 64


def copied(code, data, size, *, seed=0, late=None, wait="cp.async.wait_all;", threads=THREADS):
    """What shared memory holds after each thread has executed ``code``, from [%q1] to [%r1]."""
    total = threads * size
    y = np.zeros(total, np.uint8)
    dump = "".join(
        dumps("y", 4 * threads * i, 4 * threads).replace(
            "st.global.b32 [%q31]", f"st.global.b32 [%q31+{4 * threads * i}]"
        )
        for i in range(size // 4)
    )
    text = kernel(
        f"""mov.u32 %r1, smem; mad.lo.u32 %r1, %tid, {size}, %r1; mad.wide.u32 %q1, %tid, {size}, %x;
        and.b32 %r2, %tid, {size - 1}; setp.ne.u32 %p1, %r2, 0;
        {code}
        {wait} bar.sync 0;
        {dump}""",
        "x y",
    )
    launch(text, [In("x", data), Out("y", y)], seed=seed, late=late, threads=threads)
    return y.reshape(threads, size)


CACHES = [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)]


@pytest.mark.parametrize(("level", "size"), CACHES)
@pytest.mark.parametrize("late", LATES)
def test_all_of_it(level, size, late):
    data = numbers(THREADS * size, np.uint8)
    for where in ("shared", "shared::cta"):
        found = copied(
            f"cp.async.{level}.{where}.global.L2::128B [%r1], [%q1], {size};", data, size, late=late
        )
        np.testing.assert_array_equal(found, data.reshape(-1, size))


@pytest.mark.parametrize(("level", "size"), CACHES)
@pytest.mark.parametrize("late", LATES)
def test_zeros_follow_a_source_that_is_shorter(level, size, late):
    data = numbers(THREADS * size, np.uint8)
    found = copied(
        f"cp.async.{level}.shared.global [%r1], [%q1], {size}, %r2;", data, size, late=late
    )
    lengths = np.arange(THREADS) % size
    expected = np.where(np.arange(size) < lengths[:, None], data.reshape(-1, size), 0)
    np.testing.assert_array_equal(found, expected)
    found = copied(
        f"cp.async.{level}.shared.global [%r1], [%q1], {size}, 3;", data, size, late=late
    )
    np.testing.assert_array_equal(found, np.where(np.arange(size) < 3, data.reshape(-1, size), 0))


@pytest.mark.parametrize(("level", "size"), CACHES)
def test_a_source_that_is_ignored(level, size):
    data = numbers(THREADS * size, np.uint8)
    policy = "createpolicy.fractional.L2::evict_last.b64 %q9;"
    for code in (
        f"cp.async.{level}.shared.global [%r1], [%q1], {size}, %p1;",
        f"{policy} cp.async.{level}.shared.global.L2::cache_hint [%r1], [%q1], {size}, %p1, %q9;",
    ):
        found = copied(code, data, size)
        ignored = (np.arange(THREADS) % size != 0)[:, None]
        np.testing.assert_array_equal(found, np.where(ignored, 0, data.reshape(-1, size)))
    with_policy = (
        f"{policy} cp.async.{level}.shared.global.L2::cache_hint [%r1], [%q1], {size}, %q9;"
    )
    np.testing.assert_array_equal(copied(with_policy, data, size), data.reshape(-1, size))


def test_nothing_is_read_of_a_source_of_no_bytes():
    # Its address may be anything.
    code = "mov.u64 %q1, 4097; cp.async.ca.shared.global [%r1], [%q1], 8, 0;"
    assert not copied(code, numbers(8 * THREADS, np.uint8), 8).any()


def test_only_lanes_that_ask():
    code = "st.shared.v2.u32 [%r1], {%tid, %tid}; @%p1 cp.async.ca.shared.global [%r1], [%q1], 8;"
    data = numbers(8 * THREADS, np.uint8)
    asked = (np.arange(THREADS) % 8 != 0)[:, None]
    own = np.repeat(np.arange(THREADS, dtype=np.uint32), 2).view(np.uint8).reshape(-1, 8)
    np.testing.assert_array_equal(copied(code, data, 8), np.where(asked, data.reshape(-1, 8), own))


# ---- Groups: stage i is copied as group i, and looked at behind a wait


def pipeline(groups, looks, *, seed=0, late=None, between=""):
    """``groups``: the stages of each, in order. ``looks``: how many may be under way, what is read."""
    x = numbers(64 * (1 + max(stage for group in groups for stage in group)))
    y = np.zeros((len(looks), 64), np.uint32)
    code = [
        "mov.u32 %r1, smem; mad.lo.u32 %r1, %tid, 4, %r1;",
        "mad.wide.u32 %q1, %tid, 4, %x; mad.wide.u32 %q2, %tid, 4, %y;",
    ]
    for group in groups:
        code += [f"cp.async.ca.shared.global [%r1+{256 * s}], [%q1+{256 * s}], 4;" for s in group]
        code.append("cp.async.commit_group;")
    for i, (left, stage) in enumerate(looks):
        code.append(f"cp.async.wait_group {left};" if left is not None else "")
        code.append(
            f"{between} ld.shared.u32 %r2, [%r1+{256 * stage}]; st.global.u32 [%q2+{256 * i}], %r2;"
        )
    code.append("cp.async.wait_all;")
    launch(kernel("\n".join(code), "x y"), [In("x", x), Out("y", y)], seed=seed, late=late)
    np.testing.assert_array_equal(y, x.reshape(-1, 64)[[stage for _, stage in looks]])


COMPLETE = {
    "the first of three": ([[0], [1], [2]], [(2, 0)]),
    "one by one": ([[0], [1], [2]], [(2, 0), (1, 1), (0, 2)]),
    "two in a group": ([[0, 1], [2]], [(1, 0), (1, 1), (0, 2)]),
    "empty groups count": ([[0], [], [], [1]], [(3, 0), (0, 1)]),
    "more than there are": ([[0]], [(0, 0), (7, 0)]),
}
UNDER_WAY = {
    "the second of three": ([[0], [1], [2]], [(2, 1)]),
    "no wait": ([[0]], [(None, 0)]),
    "a group too many left": ([[0, 1], [2]], [(1, 2)]),
    "an empty group taken for one": ([[0], [1]], [(2, 0)]),
    "one of an open group": ([[0], []], [(2, 0)]),
}


@pytest.mark.parametrize("what", COMPLETE)
def test_a_wait_is_for_the_oldest_groups(what):
    for seed in range(6):
        pipeline(*COMPLETE[what], seed=seed)


@pytest.mark.parametrize("what", UNDER_WAY)
@pytest.mark.parametrize("late", LATES)
def test_what_may_be_under_way_is_not_to_be_read(what, late):
    # Also where it has come early: nobody could know.
    for seed in range(3):
        with pytest.raises(
            Fault,
            match=r"ld.shared.*: reads shared .* that line \d+, asynchronous, may still be writing",
        ):
            pipeline(*UNDER_WAY[what], seed=seed, late=late)


TOUCHED = {
    "written": ("st.shared.u32 [%r1], %tid;", "writes shared memory at .* may still be writing"),
    "copied to again": (
        "cp.async.ca.shared.global [%r1], [%q1], 4;",
        "writes shared memory at .* may still be writing",
    ),
    "an atomic": (
        "red.shared.add.u32 [%r1], 1;",
        "updates shared memory at .* may still be writing",
    ),
    "by another thread": (
        "bar.sync 0; xor.b32 %r2, %r1, 128; ld.shared.u32 %r3, [%r2];",
        "reads shared memory at .* may still be writing",
    ),
}


@pytest.mark.parametrize("what", TOUCHED)
@pytest.mark.parametrize("late", LATES)
def test_the_destination_is_not_touched_before_the_wait(what, late):
    touch, message = TOUCHED[what]
    code = f"cp.async.ca.shared.global [%r1], [%q1], 4; cp.async.commit_group; {touch}"
    with pytest.raises(Fault, match=message):
        copied(code, numbers(4 * THREADS, np.uint8), 4, late=late)


def test_a_copy_does_not_overwrite_what_others_may_still_read():
    # One warp reads what the other one copies over.
    code = """st.shared.u32 [%r1], %tid; bar.sync 0; xor.b32 %r2, %r1, 128; ld.shared.u32 %r3, [%r2]; {}
        cp.async.ca.shared.global [%r1], [%q1], 4;"""
    data = numbers(4 * THREADS, np.uint8)
    for seed in range(10):
        copied(code.format("bar.sync 0;"), data, 4, seed=seed)
    found = [fault_of(lambda: copied(code.format(""), data, 4, seed=seed)) for seed in range(20)]  # noqa: B023
    assert any(found)
    one = r"cp.async.*: writes shared memory at \d+ that warp \d reads in line \d+, with no barrier"
    other = r"ld.shared.*: reads shared memory at \d+ that line \d+, asynchronous, may still"
    other += r"|ld.shared.*: reads shared memory at \d+ that warp \d writes in line \d+"
    assert all(re.search(f"{one}|{other}", f) for f in found if f)


@pytest.mark.parametrize(
    ("reader", "meets"),
    [("xor.b32 %r2, %r1, 4;", "bar.warp.sync -1;"), ("xor.b32 %r2, %r1, 128;", "bar.sync 0;")],
    ids=["lane", "warp"],
)
def test_a_wait_is_for_ones_own_copies(reader, meets):
    # What another lane, or another warp, has copied is there when one has met it behind its wait.
    data = numbers(4 * THREADS, np.uint8)
    y_is = f"{reader} ld.shared.u32 %r3, [%r2]; bar.sync 0;"
    code = "cp.async.ca.shared.global [%r1], [%q1], 4; cp.async.wait_all; {} " + y_is
    for seed in range(6):
        copied(code.format(meets), data, 4, seed=seed)
    found = [fault_of(lambda: copied(code.format(""), data, 4, seed=seed)) for seed in range(20)]  # noqa: B023
    assert any(found)
    why = "no __syncwarp between|with no barrier between|may still be writing"
    assert all(re.search(why, f) for f in found if f)


def test_lanes_wait_for_themselves():
    # The lanes of a warp part: some wait and read their own, the others have not waited.
    code = """cp.async.ca.shared.global [%r1], [%q1], 4;
        @%p1 bra OTHERS; cp.async.wait_all; ld.shared.u32 %r3, [%r1]; bra END;
        OTHERS: {} ld.shared.u32 %r3, [%r1];
        END: cp.async.wait_all;"""
    data = numbers(4 * THREADS, np.uint8)
    for late in LATES:
        copied(code.format("cp.async.wait_all;"), data, 4, late=late)
        with pytest.raises(Fault, match="may still be writing"):
            copied(code.format(""), data, 4, late=late)


@pytest.mark.parametrize("late", LATES)
def test_the_source_is_read_at_any_time_before_the_wait(late):
    # Another warp stores to it with no order between the store and the wait: either value may come.
    code = """mov.u32 %r1, smem; mad.lo.u32 %r1, %tid, 4, %r1; mad.wide.u32 %q1, %tid, 4, %x;
        setp.ge.u32 %p2, %tid, 32; @%p2 bra STORE;
        cp.async.ca.shared.global [%r1], [%q1], 4;
        bar.sync 1, 64;
        bar.sync 2, 64;
        cp.async.wait_all;
        ld.shared.u32 %r2, [%r1]; mad.wide.u32 %q2, %tid, 4, %y; st.global.u32 [%q2], %r2;
        bra END;
        STORE:
        bar.sync 1, 64;
        st.global.u32 [%q1+-128], %tid;
        bar.sync 2, 64;
        END:"""
    x, y = numbers(64), np.zeros(32, np.uint32)
    old, stored = x[:32].copy(), np.arange(32, 64)
    launch(kernel(code, "x y"), [InOut("x", x), Out("y", y)], late=late, seed=4)
    if late == "random":
        assert ((y == stored) | (y == old)).all()
    else:
        np.testing.assert_array_equal(y, stored if late == "late" else old)


def test_a_source_must_be_ordered_when_it_is_asked_for():
    code = """mov.u32 %r1, smem; mad.lo.u32 %r1, %tid, 4, %r1; mad.wide.u32 %q1, %tid, 4, %x;
        st.global.u32 [%q1], %tid;
        {} xor.b32 %r2, %tid, 32; mad.wide.u32 %q1, %r2, 4, %x;
        cp.async.ca.shared.global [%r1], [%q1], 4; cp.async.wait_all;"""
    x = InOut("x", numbers(64))
    for seed in range(6):
        launch(kernel(code.format("bar.sync 0;"), "x"), [x], seed=seed)
    text = kernel(code.format(""), "x")
    found = [fault_of(lambda: launch(text, [x], seed=seed)) for seed in range(20)]  # noqa: B023
    assert any(found)
    both = r"cp.async.ca.shared.global: reads x\[\d+\], which another warp stores to in line \d+"
    assert all(re.search(both, f) for f in found if f)


def test_a_source_without_a_value_makes_none():
    code = """mov.u32 %r1, smem; cp.async.ca.shared.global [%r1], [%y], 4; cp.async.wait_all;
        ld.shared.u32 %r2, [%r1];"""
    for late in LATES:
        launch(
            kernel(code + "st.global.u32 [%y], 3;", "y"),
            [Out("y", np.zeros(1, np.uint32))],
            threads=1,
            late=late,
        )
        with pytest.raises(Fault, match="stores an undefined value"):
            launch(
                kernel(code + "st.global.u32 [%y], %r2;", "y"),
                [Out("y", np.zeros(1, np.uint32))],
                threads=1,
                late=late,
            )


@pytest.mark.parametrize("late", LATES)
def test_copies_are_waited_for_before_the_end(late):
    code = "mov.u32 %r1, smem; cp.async.ca.shared.global [%r1], [%x], 4; cp.async.commit_group;"
    with pytest.raises(Fault, match=r"CTA 0 has ended while line \d+, cp.async, is under way"):
        launch(kernel(code, "x"), [In("x", np.zeros(4, np.uint32))], threads=1, late=late)


@pytest.mark.parametrize("late", LATES)
@pytest.mark.parametrize("noinc", [".noinc", ""])
def test_an_mbarrier_may_wait_instead(late, noinc):
    # A lane's arrival comes when its copies have; the other warp looks behind the barrier.
    code = f"""mov.u32 %r0, smem; setp.eq.u32 %p0, %tid, 0;
        @%p0 mbarrier.init.shared::cta.b64 [%r0], {32 if noinc else 1};
        bar.sync 0;
        setp.ge.u32 %p2, %tid, 32; @%p2 bra READ;
        mad.lo.u32 %r1, %tid, 16, %r0; mad.wide.u32 %q1, %tid, 16, %x;
        cp.async.cg.shared.global [%r1+64], [%q1], 16;
        cp.async.mbarrier.arrive{noinc}.shared::cta.b64 [%r0];
        {"" if noinc else "bar.warp.sync -1; @%p0 mbarrier.arrive.shared::cta.b64 _, [%r0];"}
        READ:
        LOOP: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r0], 0;
        @!%p1 bra LOOP;
        and.b32 %r2, %tid, 31; mad.lo.u32 %r1, %r2, 16, %r0; ld.shared.v2.u32 {{%r3, %r4}}, [%r1+64];
        mad.wide.u32 %q2, %tid, 8, %y; st.global.v2.u32 [%q2], {{%r3, %r4}};"""
    x = numbers(32 * 4)
    for seed in range(6):
        y = np.zeros((2, 32, 2), np.uint32)
        launch(kernel(code, "x y"), [In("x", x), Out("y", y)], late=late, seed=seed)
        np.testing.assert_array_equal(y, np.stack(2 * [x.reshape(32, 4)[:, :2]]))


PLACES = {
    "past the end": (
        "cp.async.ca.shared.global [%r1], [%x+256], 4;",
        "reads 4 bytes at .* 4 bytes past the end of x",
    ),
    "misaligned": (
        "cp.async.ca.shared.global [%r1], [%x+4], 8;",
        r"x\[1\], whose address is not a multiple of 8",
    ),
    "misaligned in part": (
        "cp.async.ca.shared.global [%r1], [%x+4], 8, 4;",
        r"x\[1\], whose address is not a multiple of 8",
    ),
    "misaligned in shared memory": (
        "cp.async.ca.shared.global [%r1+4], [%x], 8;",
        "shared memory at 4, not a multiple of 8",
    ),
    "past the end of shared memory": (
        "cp.async.ca.shared.global [%r1+4096], [%x], 4;",
        "writes 4 bytes at 4096 of shared memory",
    ),
    "more than it copies": ("cp.async.ca.shared.global [%r1], [%x], 4, 5;", "copies 5 bytes to 4"),
    "an undefined size": (
        "cp.async.ca.shared.global [%r1], [%x], 4, %r2;",
        "undefined value for the size of a source",
    ),
    "undefined, whether it is ignored": (
        "cp.async.ca.shared.global [%r1], [%x], 4, %p1;",
        "undefined predicate for whether",
    ),
    "an undefined address": (
        "cp.async.ca.shared.global [%r1], [%q1], 4;",
        "undefined value for an address",
    ),
}


@pytest.mark.parametrize("what", PLACES)
def test_a_place_that_is_not_for_it(what):
    code, message = PLACES[what]
    with pytest.raises(Fault, match=message):
        launch(
            kernel(f"mov.u32 %r1, smem; {code} cp.async.wait_all;", "x"),
            [In("x", numbers(64))],
            threads=1,
        )


REFUSED = """
    cp.async.shared.global [%r1], [%q1], 4
    cp.async.cg.shared.global [%r1], [%q1], 8
    cp.async.ca.shared.global [%r1], [%q1], 12
    cp.async.ca.shared.global [%r1], [%q1], %r2
    cp.async.ca.shared.global [%r1], [%q1]
    cp.async.ca.shared.global %r1, [%q1], 4
    cp.async.ca.shared.global.L2::cache_hint [%r1], [%q1], 4
    cp.async.ca.shared.global.L3 [%r1], [%q1], 4
    cp.async.ca.shared::cluster.global [%r1], [%q1], 4
    cp.async.ca.global.shared [%q1], [%r1], 4, 4, 4
    cp.async.wait_group %r1
    cp.async.wait_group
    cp.async.wait_all 1
    cp.async.commit_group.now
    cp.sync.ca.shared.global [%r1], [%q1], 4
    cp.reduce.async.add.u32 [%r1], [%q1], 4
"""


@pytest.mark.parametrize("code", [line.strip() for line in REFUSED.strip().split("\n")])
def test_what_is_no_instruction_is_refused(code):
    with pytest.raises(UnknownInstruction, match=re.escape(code.split()[0])):
        launch(kernel(f"{code};", "x"), [In("x", np.zeros(64))], threads=1)


def test_what_copies_cost():
    text = kernel(
        """mov.u32 %r1, smem; mad.lo.u32 %r1, %tid, 16, %r1; mad.wide.u32 %q1, %tid, 16, %x;
        setp.lt.u32 %p1, %tid, 8; setp.ge.u32 %p2, %tid, 8;
        @%p1 cp.async.cg.shared.global [%r1], [%q1], 16;
        @%p2 cp.async.ca.shared.global [%r1], [%q1], 16, 0;
        cp.async.wait_all;""",
        "x",
    )
    ran = launch(text, [In("x", numbers(512, np.uint8))], threads=32)
    costs = {
        c.opcode.split(".")[2]: (c.bytes, c.sectors, c.wavefronts)
        for c in ran.counts
        if c.opcode.startswith("cp.async.c")
    }
    assert costs == {"cg": (128, 4, 1), "ca": (0, 0, 3)}
