import functools

import numpy as np
import pytest

from ptx import Fault, In, InOut, Out, TensorMap, UnknownInstruction
from ptx.handwritten import dumps, fills, kernel, launch, numbers, waits

SEEDS = range(20)
MBARRIER = "mbarrier::complete_tx::bytes"
SYNC = "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;"
CTAS = 4


def caught(case, **changes):
    def one(seed):
        try:
            return not case(seed, **changes)
        except Fault:
            return True

    return any(one(seed) for seed in SEEDS)


# ---- barrier.cluster: each CTA writes a number into its shared memory and reads its neighbour's

NEIGHBOUR = """
    mov.u32 %r0, smem;
    setp.eq.u32 %p0, %tid, 0;
    add.u32 %r1, %rank, 100;
    @%p0 st.shared.u32 [%r0], %r1;
    {before}
    add.u32 %r2, %rank, 1; and.b32 %r2, %r2, 3;
    mapa.shared::cluster.u32 %r3, %r0, %r2;
    ld.shared::cluster.u32 %r4, [%r3];
    mov.u32 %r5, %ctaid.x;
    mad.wide.u32 %q0, %r5, 4, %y;
    @%p0 st.global.u32 [%q0], %r4;
    {after}
"""


def neighbours(seed, before=SYNC, after=SYNC, grid=2 * CTAS):
    y = np.zeros(grid, np.uint32)
    text = kernel(NEIGHBOUR.format(before=before, after=after), "y")
    launch(text, [Out("y", y)], grid=grid, cluster=CTAS, resident=2 * CTAS, seed=seed)
    return y.tolist() == [100 + (i + 1) % CTAS for i in range(CTAS)] * (grid // CTAS)


@pytest.mark.parametrize(
    "sync",
    [
        SYNC,
        "barrier.cluster.arrive;\nbarrier.cluster.wait;",
        "barrier.cluster.arrive.aligned;\nmov.u32 %r9, 1;\nbarrier.cluster.wait.aligned;",
    ],
)
def test_a_cluster_meets(sync):
    for seed in range(8):
        assert neighbours(seed, before=sync)
        assert neighbours(seed, before=3 * sync)


@pytest.mark.parametrize(
    "changes",
    [
        {"before": ""},
        {"before": "bar.sync 0;"},
        {"before": "barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;"},
        {"after": ""},
    ],
    ids=str,
)
def test_a_cluster_that_does_not_meet_is_caught(changes):
    assert caught(neighbours, **changes)


@pytest.mark.parametrize(
    ("sync", "message"),
    [
        ("barrier.cluster.wait;", "hasn't arrived"),
        ("barrier.cluster.arrive;\n" * 2, r"again, with no barrier\.cluster\.wait"),
    ],
)  # fmt: skip
def test_a_barrier_used_wrongly_is_a_fault(sync, message):
    with pytest.raises(Fault, match=message):
        neighbours(0, before=sync)


@pytest.mark.parametrize("met", ["bar.warp.sync -1;", ""])
def test_lanes_that_have_not_waited_know_nothing_of_other_ctas(met):
    """One lane waits, and another one reads: it must meet the first."""
    body = f"""
        mov.u32 %r0, smem; setp.eq.u32 %p0, %tid, 0; setp.eq.u32 %p1, %tid, 1;
        @%p0 st.shared.u32 [%r0], %rank;
        barrier.cluster.arrive;
        @%p0 barrier.cluster.wait;
        {met}
        xor.b32 %r2, %rank, 1; mapa.shared::cluster.u32 %r3, %r0, %r2;
        @%p1 ld.shared::cluster.u32 %r4, [%r3];
        mad.wide.u32 %q0, %rank, 4, %y;
        @%p1 st.global.u32 [%q0], %r4;
        @!%p0 barrier.cluster.wait;
        {SYNC}"""
    for seed in SEEDS:
        y = np.zeros(2, np.uint32)
        act = functools.partial(
            launch, kernel(body, "y"), [Out("y", y)], threads=32, grid=2, cluster=2, seed=seed
        )
        if met:
            act()
            assert y.tolist() == [1, 0]
        else:
            with pytest.raises(Fault, match=r"with no barrier between|an undefined value"):
                act()


def test_a_cluster_waits_for_no_thread_that_has_ended():
    # CTA 3 ends, and half of the others' threads do.
    body = f"""
        setp.ge.u32 %p0, %rank, 3;
        @%p0 ret;
        setp.ge.u32 %p0, %tid, 16;
        @%p0 ret;
        {SYNC}
        mad.wide.u32 %q0, %rank, 64, %y; mad.wide.u32 %q0, %tid, 4, %q0;
        st.global.u32 [%q0], %rank;"""
    for seed in range(8):
        y = np.zeros((3, 16), np.uint32)
        launch(kernel(body, "y"), [Out("y", y)], grid=CTAS, cluster=CTAS, seed=seed)
        assert np.array_equal(y, np.arange(3)[:, None].repeat(16, 1))


def test_a_cluster_that_a_cta_never_comes_to_is_named():
    body = "setp.eq.u32 %p0, %rank, 2;\nSPIN: @%p0 bra SPIN;" + SYNC
    with pytest.raises(Fault, match=r"barrier\.cluster\.wait"):
        launch(kernel(body, ""), [], grid=CTAS, cluster=CTAS)


def test_an_order_that_a_cluster_barrier_has_not_is_refused():
    with pytest.raises(UnknownInstruction, match="relaxed"):
        launch(kernel("barrier.cluster.wait.relaxed;", ""), [])


# ---- mbarriers of other CTAs: everyone arrives at CTA 0's, which then reads what they have written

REMOTE = """
    mov.u32 %r0, smem;
    setp.eq.u32 %p0, %tid, 0;
    setp.eq.u32 %p1, %rank, 0;
    and.pred %p2, %p0, %p1;
    @%p2 mbarrier.init.shared::cta.b64 [%r0+1024], {count};
    {init}
    add.u32 %r1, %rank, 100;
    @%p0 st.shared.u32 [%r0], %r1;
    mapa.shared::cluster.u32 %r2, %r0, 0;
    @%p0 {arrive}
    @!%p1 bra END;
    {wait}
    and.b32 %r3, %tid, 3;
    mapa.shared::cluster.u32 %r3, %r0, %r3;
    setp.lt.u32 %p3, %tid, 4;
    @%p3 ld.shared::cluster.u32 %r4, [%r3];
    mad.wide.u32 %q0, %tid, 4, %y;
    @%p3 st.global.u32 [%q0], %r4;
END:
    {end}
"""
ARRIVE = "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r2+1024];"


def remote(seed, init=SYNC, arrive=ARRIVE, wait=None, end=SYNC, count=CTAS):
    wait = waits("%r0+1024", 0) if wait is None else wait
    y = np.zeros(CTAS, np.uint32)
    body = REMOTE.format(init=init, arrive=arrive, wait=wait, end=end, count=count)
    launch(kernel(body, "y"), [Out("y", y)], grid=CTAS, cluster=CTAS, seed=seed, threads=32)
    return y.tolist() == [100, 101, 102, 103]


def test_ctas_arrive_at_one_mbarrier():
    generic = "mbarrier.arrive.release.cluster.b64 _, [%q2+1024];"
    address = "mov.u64 %q1, smem; cvta.shared.u64 %q1, %q1; mapa.u64 %q2, %q1, 0;"
    for seed in range(8):
        assert remote(seed)
        assert remote(seed, arrive=ARRIVE.replace(".release.cluster", ""))
        assert remote(seed, init=SYNC + address, arrive=generic)
        assert remote(seed, arrive=ARRIVE.replace("];", "], 2;"), count=2 * CTAS)


@pytest.mark.parametrize(
    "changes",
    [
        {"wait": ""},
        {"count": CTAS - 1},
        {"init": ""},
        {"arrive": ARRIVE.replace("release", "relaxed")},
        {"wait": waits("%r0+1024", 1)},
        {"end": ""},
    ],
    ids=str,
)
def test_a_planted_fault_between_ctas_is_caught(changes):
    assert caught(remote, **changes)


def test_the_state_of_another_ctas_mbarrier_is_a_fault():
    address = "mov.u64 %q1, smem; cvta.shared.u64 %q1, %q1; mapa.u64 %q2, %q1, 0;"
    with pytest.raises(Fault, match="state of another CTA"):
        remote(
            0, init=SYNC + address, arrive="mbarrier.arrive.release.cluster.b64 %q3, [%q2+1024];"
        )


# ---- Multicast: CTA 0 reads a row for all CTAs of a mask

MULTICAST = """
    mov.u32 %r0, smem;
    setp.eq.u32 %p0, %tid, 0;
    @%p0 mbarrier.init.shared::cta.b64 [%r0+1024], 1;
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0+1024], {expected};
    {init}
    mov.u32 %r1, {mask};
    cvt.u16.u32 %h0, %r1;
    setp.eq.u32 %p1, %rank, 1;
    and.pred %p2, %p0, %p1;
    @%p2 {copy}
    shr.u32 %r2, %r1, %rank; and.b32 %r2, %r2, 1; setp.eq.u32 %p3, %r2, 0;
    @%p3 bra END;
    {wait}
    mad.wide.u32 %y2, %rank, 256, %y;
    {dump}
END:
    {end}
"""
PLAIN = (
    f"cp.async.bulk.shared::cluster.global.{MBARRIER}.multicast::cluster "
    "[%r0+256], [%x], 256, [%r0+1024], %h0;"
)
TENSOR = (
    f"cp.async.bulk.tensor.2d.shared::cluster.global.{MBARRIER}.multicast::cluster "
    "[%r0+256], [%x, {0, 1}], [%r0+1024], %h0;"
)


def multicast(
    seed, copy=PLAIN, mask=0b1101, init=SYNC, wait=None, end=SYNC, expected=256, late=None
):
    wait = waits("%r0+1024", 0) if wait is None else wait
    x, y = numbers(192).reshape(3, 64), np.zeros((CTAS, 64), np.uint32)
    tensor = copy == TENSOR
    body = MULTICAST.format(
        copy=copy,
        mask=mask,
        init=init,
        wait=wait,
        end=end,
        expected=expected,
        dump=dumps("y2", 256, 256),
    )
    text = kernel(body, "x:map y" if tensor else "x y", registers=".reg .b64 %y2;")
    argument = TensorMap(In("x", x), (64, 1)) if tensor else In("x", x)
    launch(text, [argument, InOut("y", y)], grid=CTAS, cluster=CTAS, seed=seed, late=late)
    row = x[1 if tensor else 0]
    return all(np.array_equal(y[i], row if mask >> i & 1 else 0 * row) for i in range(CTAS))


@pytest.mark.parametrize("copy", [PLAIN, TENSOR], ids=["plain", "tensor"])
@pytest.mark.parametrize("late", ["late", "random", "soon"])
def test_multicast_reaches_the_ctas_of_its_mask(copy, late):
    for seed, mask in enumerate((0b1101, 0b0010, 0b1111)):
        assert multicast(seed, copy=copy, mask=mask, late=late)


@pytest.mark.parametrize(
    "changes",
    [
        {"wait": ""},
        {"init": "bar.sync 0;"},
        {"expected": 128},
        {"expected": 512},
        {"mask": 0b10001},
        {"mask": 0},
    ],
    ids=str,
)
def test_a_planted_fault_of_multicast_is_caught(changes):
    assert caught(multicast, **changes)


def test_a_pair_of_ctas_may_share_an_mbarrier():
    # Each CTA loads a row of its own; both count at CTA 0's barrier.
    body = f"""
        mov.u32 %r0, smem;
        setp.eq.u32 %p0, %tid, 0;
        setp.eq.u32 %p1, %rank, 0;
        @%p0 mbarrier.init.shared::cta.b64 [%r0+1024], 1;
        and.pred %p2, %p0, %p1;
        @%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0+1024], 512;
        {SYNC}
        mapa.shared::cluster.u32 %r1, %r0, 0;
        @%p0 cp.async.bulk.tensor.2d.shared::cluster.global.{MBARRIER}.cta_group::2
            [%r0+256], [%x, {{0, %rank}}], [%r1+1024];
        @!%p1 bra MEET;
        {waits("%r0+1024", 0)}
    MEET:
        {SYNC}
        mad.wide.u32 %y2, %rank, 256, %y;
        {dumps("y2", 256, 256)}"""
    x = numbers(128).reshape(2, 64)
    for seed in range(8):
        y = np.zeros((2, 64), np.uint32)
        text = kernel(body, "x:map y", registers=".reg .b64 %y2;")
        launch(text, [TensorMap(In("x", x), (64, 1)), Out("y", y)], grid=2, cluster=2, seed=seed)
        assert np.array_equal(x, y)
    text = text.replace(".cta_group::2", ".cta_group::1")
    with pytest.raises(Fault, match="copies to CTA 1 and tells an mbarrier of CTA 0"):
        launch(text, [TensorMap(In("x", x), (64, 1)), Out("y", y)], grid=2, cluster=2)


def test_multicast_may_tell_one_ctas_mbarrier_of_each_pair():
    # CTA 3 reads a row for all four; CTAs 1 and 3 count what comes to their pairs.
    body = f"""
        mov.u32 %r0, smem;
        setp.eq.u32 %p0, %tid, 0;
        and.b32 %r2, %rank, 1;
        setp.eq.u32 %p1, %r2, 1;
        and.pred %p2, %p0, %p1;
        @%p2 mbarrier.init.shared::cta.b64 [%r0+1024], 1;
        @%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0+1024], 512;
        {SYNC}
        mov.u16 %h0, 15;
        setp.eq.u32 %p3, %rank, 3;
        and.pred %p3, %p3, %p0;
        @%p3 {TENSOR.replace(MBARRIER, f"{MBARRIER}.cta_group::2")}
        @!%p1 bra MEET;
        {waits("%r0+1024", 0)}
    MEET:
        {SYNC}
        mad.wide.u32 %y2, %rank, 256, %y;
        {dumps("y2", 256, 256)}"""
    x = numbers(192).reshape(3, 64)
    for seed in range(8):
        y = np.zeros((CTAS, 64), np.uint32)
        text = kernel(body, "x:map y", registers=".reg .b64 %y2;")
        arguments = [TensorMap(In("x", x), (64, 1)), Out("y", y)]
        launch(text, arguments, grid=CTAS, cluster=CTAS, seed=seed)
        assert np.array_equal(y, np.repeat(x[1:2], CTAS, axis=0))


# ---- Between CTAs: each gives its row to the next one

PASSED = """
    mov.u32 %r0, smem;
    setp.eq.u32 %p0, %tid, 0;
    @%p0 mbarrier.init.shared::cta.b64 [%r0+1024], 1;
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0+1024], 256;
    mad.wide.u32 %x2, %rank, 256, %x;
    {fill}
    {fence}
    {init}
    add.u32 %r1, %rank, 1; and.b32 %r1, %r1, 3;
    mapa.shared::cluster.u32 %r2, %r0, %r1;
    @%p0 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes
        [%r2+512], [%r0+256], 256, [%r2+1024];
    {wait}
    mad.wide.u32 %y2, %rank, 256, %y;
    {dump}
    {end}
"""


def passed(seed, fence="fence.proxy.async.shared::cta;", init=SYNC, wait=None, end=SYNC, late=None):
    wait = waits("%r0+1024", 0) if wait is None else wait
    x, y = numbers(CTAS * 64).reshape(CTAS, 64), np.zeros((CTAS, 64), np.uint32)
    fill, dump = fills("x2", 256, 256), dumps("y2", 512, 256)
    body = PASSED.format(fill=fill, fence=fence, init=init, wait=wait, dump=dump, end=end)
    text = kernel(body, "x y", registers=".reg .b64 %x2, %y2;")
    launch(text, [In("x", x), Out("y", y)], grid=CTAS, cluster=CTAS, seed=seed, late=late)
    return np.array_equal(y, np.roll(x, 1, axis=0))


@pytest.mark.parametrize("late", ["late", "random", "soon"])
def test_a_copy_between_ctas_arrives(late):
    for seed in range(6):
        assert passed(seed, late=late)


@pytest.mark.parametrize(
    "changes", [{"fence": ""}, {"wait": ""}, {"init": "bar.sync 0;"}, {"end": ""}], ids=str
)
def test_a_planted_fault_of_a_copy_between_ctas_is_caught(changes):
    assert caught(passed, **changes)


# ---- Reductions between CTAs: all of them change CTA 0's row, which counts what comes

REDUCED = """
    mov.u32 %r0, smem;
    setp.eq.u32 %p0, %tid, 0;
    setp.eq.u32 %p1, %rank, 0;
    and.pred %p2, %p0, %p1;
    @%p2 mbarrier.init.shared::cta.b64 [%r0+1024], 1;
    @%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0+1024], {expected};
    mad.wide.u32 %x2, %rank, 256, %x;
    {fill}
    {start}
    fence.proxy.async.shared::cta;
    {init}
    mapa.shared::cluster.u32 %r2, %r0, 0;
    @%p0 cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.{form}
        [%r2+512], [%r0+256], 256, [%r2+1024];
    @!%p1 bra END;
    {wait}
    {dump}
END:
    {end}
"""


def reduced(seed, form="add.u32", expected=CTAS * 256, init=SYNC, wait=None, end=SYNC, late=None):
    wait = waits("%r0+1024", 0) if wait is None else wait
    op, kind = form.split(".")
    dtype = {"u": "uint", "s": "int", "b": "uint"}[kind[0]] + kind[1:]
    x = numbers(CTAS * 64).reshape(CTAS, 64).view(dtype)
    start, y = numbers(64, seed=2).view(dtype), np.zeros(64, np.uint32).view(dtype)
    body = REDUCED.format(
        form=form, expected=expected, init=init, wait=wait, end=end,
        fill=fills("x2", 256, 256), start=fills("z", 512, 256), dump=dumps("y", 512, 256),
    )  # fmt: skip
    text = kernel(body, "x z y", registers=".reg .b64 %x2;")
    arguments = [In("x", x), In("z", start), Out("y", y)]
    launch(text, arguments, grid=CTAS, cluster=CTAS, seed=seed, late=late)
    combine = {"add": np.add, "min": np.minimum, "max": np.maximum, "xor": np.bitwise_xor}[op]
    return np.array_equal(y, functools.reduce(combine, x, start))


@pytest.mark.parametrize("form", ["add.u32", "add.s32", "add.u64", "min.s32", "max.u32", "xor.b32"])
def test_ctas_reduce_into_one(form):
    for seed in range(6):
        assert reduced(seed, form)


@pytest.mark.parametrize(
    "changes",
    [{"wait": ""}, {"init": "bar.sync 0;"}, {"end": ""}, {"expected": 3 * 256}],
    ids=str,
)
def test_a_planted_fault_of_a_reduction_between_ctas_is_caught(changes):
    assert caught(reduced, **changes)


@pytest.mark.parametrize("form", ["add.f32", "min.u64", "add.noftz.f16", "xor.b64"])
def test_a_reduction_between_ctas_of_another_type_is_refused(form):
    code = f"cp.reduce.async.bulk.shared::cluster.shared::cta.{MBARRIER}.{form} [%r0], [%r0], 16, [%r0];"
    with pytest.raises(UnknownInstruction, match="no such reduction of this type"):
        launch(kernel(code, ""), [])
