import numpy as np
import pytest

from ptx import Fault, In, InOut, Out
from ptx.handwritten import kernel, launch, numbers, waits

LATE = ("late", "random", "soon")
SEEDS = range(20)

# ---- A ring of two buffers that a warp fills and another one empties, and buffers that are stored from

ROWS, ROW = 7, 128
RING = """
    mov.u32 %r0, smem; setp.eq.u32 %p0, %tid, 0;
    @%p0 mbarrier.init.shared::cta.b64 [%r0+1024], 1;
    @%p0 mbarrier.init.shared::cta.b64 [%r0+1032], 1;
    @%p0 mbarrier.init.shared::cta.b64 [%r0+1040], 32;
    @%p0 mbarrier.init.shared::cta.b64 [%r0+1048], 32;
    bar.sync 0;
    mov.u32 %r1, 0;  // the row
    setp.ne.u32 %p1, %warp, 0;
    @%p1 bra READ;
    @!%p0 bra END;
FILL:
    and.b32 %r2, %r1, 1; shr.u32 %r3, %r1, 1; and.b32 %r3, %r3, 1; xor.b32 %r4, %r3, 1;
    mad.lo.u32 %r5, %r2, 8, %r0;     // barriers: +1024 full, +1040 empty
    mad.lo.u32 %r6, %r2, 128, %r0;   // the buffer
    add.u32 %r7, %r5, 1040;
    {empty}
    add.u32 %r7, %r5, 1024;
    {expect}
    mad.wide.u32 %q0, %r1, 128, %x;
    cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r6], [%q0], 128, [%r7];
    add.u32 %r1, %r1, 1; setp.lt.u32 %p2, %r1, 7;
    @%p2 bra FILL;
    bra END;
READ:
    and.b32 %r2, %r1, 1; shr.u32 %r3, %r1, 1; and.b32 %r3, %r3, 1;
    mad.lo.u32 %r5, %r2, 8, %r0;
    mad.lo.u32 %r6, %r2, 128, %r0;
    add.u32 %r7, %r5, 1024;
    {full}
    and.b32 %r8, %tid, 31;
    mad.lo.u32 %r9, %r8, 4, %r6;
    ld.shared.u32 %r10, [%r9];
    mad.wide.u32 %q0, %r1, 128, %y; mad.wide.u32 %q0, %r8, 4, %q0;
    st.global.u32 [%q0], %r10;
    mbarrier.arrive.shared::cta.b64 _, [%r5+1040];
    add.u32 %r1, %r1, 1; setp.lt.u32 %p2, %r1, 7;
    @%p2 bra READ;
END:
"""
EXPECT = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r7], {};"


def ring(seed, late=None, **changes):
    parts = {
        "empty": waits("%r7", "%r4"),
        "expect": EXPECT.format(128),
        "full": waits("%r7", "%r3"),
    }
    x, y = numbers(ROWS * ROW // 4), np.zeros(ROWS * ROW // 4, np.uint32)
    body = RING.format(**(parts | changes))
    launch(kernel(body, "x y"), [In("x", x), Out("y", y)], seed=seed, late=late)
    return np.array_equal(x, y)


OUT = """
    mov.u32 %r0, smem; setp.eq.u32 %p0, %tid, 0; mov.u32 %r1, 0;
NEXT:
    and.b32 %r2, %r1, 1; mad.lo.u32 %r6, %r2, 256, %r0; mad.lo.u32 %r7, %tid, 4, %r6;
    mad.wide.u32 %q0, %r1, 256, %x; mad.wide.u32 %q1, %tid, 4, %q0;
    ld.global.u32 %r8, [%q1];
    {free}
    bar.sync 0;
    st.shared.u32 [%r7], %r8;
    {fence}
    bar.sync 0;
    mad.wide.u32 %q0, %r1, 256, %y;
    @%p0 cp.async.bulk.global.shared::cta.bulk_group [%q0], [%r6], 256;
    {commit}
    add.u32 %r1, %r1, 1; setp.lt.u32 %p2, %r1, 7;
    @%p2 bra NEXT;
    {end}
"""


def out(seed, late=None, **changes):
    parts = {
        "free": "@%p0 cp.async.bulk.wait_group.read 1;",
        "fence": "fence.proxy.async.shared::cta;",
        "commit": "@%p0 cp.async.bulk.commit_group;",
        "end": "@%p0 cp.async.bulk.wait_group.read 0;",
    }
    x, y = numbers(ROWS * 64), np.zeros(ROWS * 64, np.uint32)
    body = OUT.format(**(parts | changes))
    launch(kernel(body, "x y"), [In("x", x), Out("y", y)], seed=seed, late=late)
    return np.array_equal(x, y)


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("case", [ring, out])
def test_results_are_the_same_whatever_the_schedule(case, late):
    for seed in range(8):
        assert case(seed, late)


PLANTED = {
    "not waited for": (ring, {"full": ""}),
    "waited for in the wrong phase": (ring, {"full": "xor.b32 %r3, %r3, 1;" + waits("%r7", "%r3")}),
    "waited for once": (
        ring,
        {"full": "mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r7], %r3;"},
    ),
    "not expected": (ring, {"expect": "mbarrier.arrive.shared::cta.b64 _, [%r7];"}),
    "expected too little": (ring, {"expect": EXPECT.format(112)}),
    "expected too much": (ring, {"expect": EXPECT.format(144)}),
    "filled before it is empty": (ring, {"empty": ""}),
    "the wrong phase of empty": (ring, {"empty": waits("%r7", "%r3")}),
    "no proxy fence": (out, {"fence": ""}),
    "used before it is read": (out, {"free": ""}),
    "used a group too early": (out, {"free": "@%p0 cp.async.bulk.wait_group.read 2;"}),
    "not committed": (out, {"commit": ""}),
    "not waited for at the end": (out, {"end": ""}),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_fault_is_caught(what):
    case, changes = PLANTED[what]

    def caught(seed):
        try:
            return not case(seed, **changes)
        except Fault:
            return True

    assert any(caught(seed) for seed in SEEDS)


READ_BACK = """
    mov.u32 %r0, smem; setp.eq.u32 %p0, %tid, 0;
    st.shared.u32 [%r0], 5; st.shared.u32 [%r0+4], 6;
    st.shared.u32 [%r0+8], 7; st.shared.u32 [%r0+12], 8;
    fence.proxy.async.shared::cta;
    cp.async.bulk.global.shared::cta.bulk_group [%y], [%r0], 16;
    cp.async.bulk.commit_group;
    {wait}
    ld.global.u32 %r1, [%y];
    st.global.u32 [%z], %r1;
    cp.async.bulk.wait_group.read 0;
"""


def read_back(seed, wait):
    y, z = np.zeros(4, np.uint32), np.zeros(1, np.uint32)
    launch(
        kernel(READ_BACK.format(wait=wait), "y z"),
        [InOut("y", y), Out("z", z)],
        threads=1,
        seed=seed,
    )
    assert y.tolist() == [5, 6, 7, 8]
    return z[0] == 5


def test_a_thread_sees_what_it_stored_when_it_has_waited_for_the_writes():
    assert all(read_back(seed, "cp.async.bulk.wait_group 0;") for seed in range(9))
    assert not all(read_back(seed, "cp.async.bulk.wait_group.read 0;") for seed in range(9))


# ---- cp.async.mbarrier.arrive

ARRIVES = """
    mov.u32 %r0, smem; setp.eq.u32 %p0, %tid, 0;
    @%p0 mbarrier.init.shared::cta.b64 [%r0+1024], {count};
    bar.sync 0;
    mad.lo.u32 %r1, %tid, 4, %r0; mad.wide.u32 %q0, %tid, 4, %x;
    cp.async.ca.shared.global [%r1], [%q0], 4;
    cp.async.mbarrier.arrive.{noinc}shared::cta.b64 [%r0+1024];
    {arrive}
    {wait}
    xor.b32 %r2, %tid, 63; mad.lo.u32 %r1, %r2, 4, %r0; mad.wide.u32 %q0, %r2, 4, %y;
    ld.shared.u32 %r3, [%r1];
    st.global.u32 [%q0], %r3;
    cp.async.wait_all;
"""


def arrives(seed, noinc="noinc.", arrive="", wait=None, count=64):
    x, y = numbers(64), np.zeros(64, np.uint32)
    wait = waits("%r0+1024", 0) if wait is None else wait
    body = ARRIVES.format(noinc=noinc, arrive=arrive, wait=wait, count=count)
    launch(kernel(body, "x y"), [In("x", x), Out("y", y)], seed=seed)
    return np.array_equal(x, y)


def test_an_mbarrier_tracks_copies_of_threads():
    arrive = "mbarrier.arrive.shared::cta.b64 _, [%r0+1024];"
    for seed in range(9):
        assert arrives(seed)
        # Without .noinc the copies' arrivals come on top of what the barrier counts.
        assert arrives(seed, noinc="", arrive=arrive)


@pytest.mark.parametrize(
    "changes",
    [
        {"wait": ""},
        {"count": 1},
        {"noinc": "", "count": 1, "arrive": "@%p0 mbarrier.arrive.shared::cta.b64 _, [%r0+1024];"},
    ],
    ids=str,
)
def test_copies_of_threads_that_are_not_waited_for_are_caught(changes):
    def caught(seed):
        try:
            return not arrives(seed, **changes)
        except Fault:
            return True

    assert any(caught(seed) for seed in SEEDS)
