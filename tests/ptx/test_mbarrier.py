import numpy as np
import pytest

from ptx import Fault, In, Out, UnknownInstruction
from ptx.handwritten import kernel, launch, numbers, waits

MOST = 2**20 - 1
SEEDS = range(20)
INIT = "mov.u32 %r0, smem; setp.eq.u32 %p0, %tid, 0; @%p0 mbarrier.init.shared::cta.b64 [%r0], {};"


def run(body, parameters="", *arguments, **options):
    return launch(kernel(body, parameters), list(arguments), **options)


def answers(body, count, **options):
    """What a kernel of one thread stores into ``y``."""
    y = np.zeros(count, np.uint32)
    launch(kernel(body, "y"), [Out("y", y)], threads=1, **options)
    return y.tolist()


class Model:
    """A barrier in Python's integers: the phases that are complete, and what the next one lacks."""

    def __init__(self, count):
        self.each, self.lacks, self.bytes, self.complete = count, count, 0, 0

    def change(self, arrivals=0, expected=0, came=0, dropped=0):
        self.each -= dropped
        self.lacks -= arrivals
        self.bytes += expected - came
        if self.lacks == 0 and self.bytes == 0:
            self.complete, self.lacks = self.complete + 1, self.each


def history(seed, steps=60):
    """Random instructions that a barrier allows, and what the model says of each wait."""
    random = np.random.default_rng(seed)
    model = Model(int(random.integers(1, 6)))
    body = [f"mov.u32 %r0, smem; mbarrier.init.shared::cta.b64 [%r0], {model.each};"]
    expected = []

    def ask(code, answer):
        body.append(f"{code} selp.u32 %r1, 1, 0, %p0; st.global.u32 [%y+{4 * len(expected)}], %r1;")
        expected.append(int(answer))

    for _ in range(steps):
        n = int(random.integers(1, model.lacks + 1)) if model.lacks else 0
        size = 16 * int(random.integers(0, 5))
        kind = random.choice(["arrive", "arrive", "expect", "come", "both", "drop", "state"])
        if kind == "arrive" and n:
            body.append(f"mbarrier.arrive.shared::cta.b64 _, [%r0], {n};")
            model.change(arrivals=n)
        elif kind == "expect" and model.lacks:
            body.append(f"mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r0], {size};")
            model.change(expected=size)
        elif kind == "come":
            body.append(
                f"mbarrier.complete_tx.shared::cta.b64 [%r0], {model.bytes};"
                if model.bytes > 0
                else ""
            )
            model.change(came=max(model.bytes, 0))
        elif kind == "both" and n:
            body.append(f"mbarrier.arrive.expect_tx.shared.b64 _, [%r0], {size};")
            model.change(arrivals=1, expected=size)
        elif kind == "drop" and n and model.each > 1:
            body.append("mbarrier.arrive_drop.release.cta.shared::cta.b64 %q0, [%r0];")
            model.change(arrivals=1, dropped=1)
        elif kind == "state" and n:
            before = model.complete
            body.append("mbarrier.arrive.b64 %q0, [%q2];")
            model.change(arrivals=1)
            ask("mbarrier.test_wait.shared::cta.b64 %p0, [%r0], %q0;", model.complete > before)
        for parity in (0, 1):
            ask(
                f"mbarrier.test_wait.parity.shared::cta.b64 %p0, [%r0], {parity};",
                model.complete % 2 != parity,
            )
    generic = "mov.u64 %q2, smem; cvta.shared.u64 %q2, %q2;"
    return "\n".join([body[0], generic, *body[1:]]), expected


@pytest.mark.parametrize("seed", range(8))
def test_phases_are_those_of_a_plain_model(seed):
    body, expected = history(seed)
    assert answers(body, len(expected)) == expected


def test_pending_count_is_what_was_pending_before():
    body = (
        INIT.format(7)
        + """
        mbarrier.arrive.noComplete.shared::cta.b64 %q0, [%r0], 2;
        mbarrier.arrive_drop.noComplete.release.cta.shared::cta.b64 %q1, [%r0], 3;
        mbarrier.pending_count.b64 %r1, %q0;
        mbarrier.pending_count.b64 %r2, %q1;
        st.global.v2.u32 [%y], {%r1, %r2};
        mbarrier.arrive.shared::cta.b64 _, [%r0], 2;
        mbarrier.test_wait.parity.shared::cta.b64 %p0, [%r0], 0;
        mbarrier.arrive.shared::cta.b64 _, [%r0], 4;
        mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r0], 1;
        selp.u32 %r3, 1, 0, %p0; selp.u32 %r4, 1, 0, %p1;
        st.global.v2.u32 [%y+8], {%r3, %r4};"""
    )
    # Three of seven dropped out, for the phases to come too.
    assert answers(body, 4) == [7, 5, 1, 1]


def test_a_barrier_can_be_made_anew():
    body = (
        INIT.format(1)
        + """
        mbarrier.arrive.shared::cta.b64 _, [%r0];
        mbarrier.inval.shared::cta.b64 [%r0];
        mbarrier.init.shared::cta.b64 [%r0], 2;
        mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r0], 0;
        selp.u32 %r1, 1, 0, %p1;
        st.global.u32 [%y], %r1;"""
    )
    assert answers(body, 1) == [0]


ARRIVE_ON = "mbarrier.arrive.shared::cta.b64"
WRONG = {
    "never initialised": ("mov.u32 %r0, smem;", f"{ARRIVE_ON} _, [%r0];", "not initialised"),
    "waited for, never initialised": (
        "mov.u32 %r0, smem;",
        "mbarrier.try_wait.parity.shared::cta.b64 %p0, [%r0], 0;",
        "not initialised",
    ),
    "initialised twice": (
        1, "mbarrier.init.shared::cta.b64 [%r0], 1;", r"again, with no mbarrier\.inval"
    ),
    "for nobody": (0, "", "for 0 arrivals"),
    "for too many": (MOST + 1, "", f"for {MOST + 1} arrivals, not 1 to {MOST}"),
    "too many arrivals": (2, f"{ARRIVE_ON} _, [%r0], 3;", "arrives 3 times .* waits for 2 of 2"),
    "no arrival": (2, f"{ARRIVE_ON} _, [%r0], 0;", "arrives 0 times"),
    "misaligned": (2, "mbarrier.init.shared::cta.b64 [%r0+4], 1;", "not a multiple of 8"),
    "too many bytes": (
        2,
        f"mbarrier.expect_tx.shared::cta.b64 [%r0], {MOST};"
        "mbarrier.expect_tx.shared::cta.b64 [%r0], 1;",
        f"wait for {MOST + 1} bytes",
    ),
    "too few bytes": (
        2, f"mbarrier.complete_tx.shared::cta.b64 [%r0], {MOST + 1};", f"wait for -{MOST + 1} bytes"
    ),
    "no parity": (1, "mbarrier.test_wait.parity.shared::cta.b64 %p0, [%r0], 2;", "parity 2"),
    "no state": (
        1, "mov.b64 %q0, 17; mbarrier.test_wait.shared::cta.b64 %p0, [%r0], %q0;", "0x11 for the state"
    ),
    "an old state": (
        1,
        f"{ARRIVE_ON} %q0, [%r0];"
        f"{ARRIVE_ON} _, [%r0];"
        f"{ARRIVE_ON} _, [%r0];"
        "mbarrier.test_wait.shared::cta.b64 %p0, [%r0], %q0;",
        "phase 0 of an mbarrier that is in phase 3",
    ),
    "an undefined state": (1, "mbarrier.test_wait.shared::cta.b64 %p0, [%r0], %q0;", "undefined value"),
    "noComplete completes": (
        2, "mbarrier.arrive.noComplete.shared::cta.b64 _, [%r0], 2;", r"by \.noComplete"
    ),
    "no pending count": (
        2, f"{ARRIVE_ON} %q0, [%r0]; mbarrier.pending_count.b64 %r1, %q0;", r"no \.noComplete"
    ),
    "used after inval": (
        2, f"mbarrier.inval.shared::cta.b64 [%r0]; {ARRIVE_ON} _, [%r0];", "not initialised"
    ),
    "read as data": (2, "ld.shared.u32 %r1, [%r0+4];", "reads the mbarrier at 0 .* as if it were data"),
    "written as data": (2, "st.shared.b8 [%r0+7], 0;", "writes the mbarrier at 0 .* as if it were data"),
    "updated as data": (2, "atom.shared.add.u32 %r1, [%r0], 1;", "updates the mbarrier at 0"),
    "in global memory": (
        2, "mov.b64 %q0, 4096; mbarrier.arrive.b64 _, [%q0];", "for an address in shared memory"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_use_is_a_fault(what):
    count, code, message = WRONG[what]
    init = INIT.format(count) if isinstance(count, int) else count
    with pytest.raises(Fault, match=message):
        run(init + code, threads=1)


@pytest.mark.parametrize(
    "code",
    [
        "mbarrier.arrive.shared::cta.b64.twice _, [%r0];",
        "mbarrier.arrive.release.shared::cta.b64 _, [%r0];",
        "mbarrier.arrive.shared::cluster.b64 %q0, [%r0];",
        "mbarrier.arrive.noComplete.shared::cta.b64 _, [%r0];",
        "mbarrier.arrive.expect_tx.noComplete.shared::cta.b64 _, [%r0], 1;",
        "mbarrier.test_wait.parity.shared::cluster.b64 %p0, [%r0], 0;",
        "mbarrier.test_wait.parity.shared::cta.b64 %p0, [%r0], 0, 100;",
        "mbarrier.arrive.shared::cta _, [%r0];",
        "mbarrier.leave.shared::cta.b64 _, [%r0];",
    ],
)
def test_what_is_no_instruction_is_refused(code):
    with pytest.raises(UnknownInstruction, match="mbarrier"):
        run(code)


# ---- Order: the first warp writes a number that the second one reads

HANDED = """
    {init}
    {sync}
    setp.ne.u32 %p1, %warp, 0;
    @%p1 bra READ;
    ld.global.u32 %r1, [%x];
    @%p0 st.shared.u32 [%r0+64], %r1;
    bar.warp.sync -1;
    {arrive}
    bra END;
READ:
    {wait}
    ld.shared.u32 %r2, [%r0+64];
    setp.eq.u32 %p2, %tid, 32;
    @%p2 st.global.u32 [%y], %r2;
END:
"""
ARRIVE = "mbarrier.arrive.release.cta.shared::cta.b64 %q0, [%r0];"


def handed(seed, count=32, sync="bar.sync 0;", arrive=ARRIVE, wait=None, **options):
    x, y = numbers(1), np.zeros(1, np.uint32)
    wait = waits("%r0", 0) if wait is None else wait
    body = HANDED.format(init=INIT.format(count), sync=sync, arrive=arrive, wait=wait)
    run(body, "x y", In("x", x), Out("y", y), seed=seed, **options)
    return y[0] == x[0]


@pytest.mark.parametrize("kind", ["try_wait", "test_wait"])
@pytest.mark.parametrize("late", ["late", "random", "soon"])
def test_a_wait_sees_what_arrivals_have_written(kind, late):
    for seed in range(5):
        assert handed(seed, wait=waits("%r0", 0, kind), late=late)


def test_a_wait_may_have_a_time_limit_and_an_order():
    for seed in range(5):
        assert handed(seed, wait=waits("%r0", "0, 0x989680", "try_wait.acquire.cluster"))


PLANTED = {
    "no wait": {"wait": ""},
    "the parity of the phase before": {"wait": waits("%r0", 1)},
    "asked once": {"wait": "mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r0], 0;"},
    "tested once": {"wait": "mbarrier.test_wait.parity.shared::cta.b64 %p3, [%r0], 0;"},
    "a relaxed arrival": {"arrive": ARRIVE.replace("release", "relaxed")},
    "a relaxed wait": {"wait": waits("%r0", 0, "try_wait.relaxed.cta")},
    "an arrival too few": {"count": 33},
    "nothing between initialisation and use": {"sync": ""},
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_fault_is_caught(what):
    def caught(seed):
        try:
            return not handed(seed, **PLANTED[what])
        except Fault:
            return True

    assert any(caught(seed) for seed in SEEDS)


def test_lanes_may_wait_for_barriers_of_their_own():
    # A barrier for each of 32 lanes; the lanes of the other warp arrive at them.
    body = """
        mov.u32 %r0, smem;
        and.b32 %r1, %tid, 31;
        mad.lo.u32 %r0, %r1, 8, %r0;
        setp.eq.u32 %p0, %warp, 0;
        @%p0 mbarrier.init.shared::cta.b64 [%r0], 1;
        bar.sync 0;
        @%p0 bra ARRIVE;
        {wait}
        mad.wide.u32 %q0, %r1, 4, %y;
        st.global.u32 [%q0], %r1;
        bra END;
    ARRIVE:
        mbarrier.arrive.shared::cta.b64 _, [%r0];
    END:
    """.replace("{wait}", waits("%r0", 0))
    for seed in range(6):
        y = np.zeros(32, np.uint32)
        run(body, "y", Out("y", y), seed=seed)
        assert y.tolist() == list(range(32))


def test_waiting_for_what_never_comes_ends_with_where_everyone_stands():
    with pytest.raises(Fault, match=r"mbarrier\.try_wait"):
        run(INIT.format(1) + "bar.sync 0;" + waits("%r0", 0), seed=1)
