"""st.async, red.async: stores to another CTA of the cluster that an mbarrier counts."""

import re

import numpy as np
import pytest

from ptx import Fault, In, Out, UnknownInstruction
from ptx.handwritten import fault_of, kernel, launch

REMOTE = """
    mov.u32 %r0, smem; setp.eq.u32 %p0, %tid, 0;
    @%p0 mbarrier.init.shared::cta.b64 [%r0], 1;
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0], {bytes};
    mad.lo.u32 %r1, %tid, 16, %r0; add.u32 %r1, %r1, 64;
    {before}
    barrier.cluster.arrive; barrier.cluster.wait;
    xor.b32 %r2, %rank, 1;
    mapa.shared::cluster.u32 %r3, %r1, %r2; mapa.shared::cluster.u32 %r4, %r0, %r2;
    mad.lo.u32 %r5, %rank, 1000, %tid; cvt.u64.u32 %q1, %r5; add.u32 %r6, %r5, 7;
    {store}
    {wait}
    ld.shared.v2.u32 {{%r7, %r8}}, [%r1];
    mad.lo.u32 %r9, %rank, 32, %tid; mad.wide.u32 %q2, %r9, 8, %y; st.global.v2.u32 [%q2], {{%r7, %r8}};
    {after}"""
WAIT = "LOOP: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r0], 0;\n@!%p1 bra LOOP;"
LEAVE = "barrier.cluster.arrive; barrier.cluster.wait;"
TELLS = "shared::cluster.mbarrier::complete_tx::bytes"


def remote(store, bytes_, seed, before="", wait=WAIT, after=LEAVE):
    y = np.zeros((2, 32, 2), np.uint32)
    body = REMOTE.format(bytes=bytes_, store=store, before=before, wait=wait, after=after)
    launch(kernel(body, "y"), [Out("y", y)], threads=32, grid=2, cluster=2, seed=seed)
    return y


SENT = 1000 * np.array([1, 0])[:, None] + np.arange(32)  # what a CTA gets from the other one
STORES = {
    f"st.async.weak.{TELLS}.v2.u32 [%r3], {{%r5, %r6}}, [%r4];": (256, SENT, SENT + 7),
    f"st.async.{TELLS}.v4.b32 [%r3], {{%r6, %r5, %r5, %r5}}, [%r4];": (512, SENT + 7, SENT),
    f"st.async.{TELLS}.b64 [%r3], %q1, [%r4];": (256, SENT, 0 * SENT),
}


@pytest.mark.parametrize("store", STORES)
def test_st_async_is_there_when_the_mbarrier_says_so(store):
    bytes_, first, second = STORES[store]
    for seed in range(6):
        y = remote(store, bytes_, seed)
        np.testing.assert_array_equal(y, np.stack([first, second], axis=2))


REDUCTIONS = {
    "add.u32": lambda a, b: a + b,
    "inc.u32": lambda a, b: np.where(a >= b, 0, a + 1),
    "dec.u32": lambda a, b: np.where((a == 0) | (a > b), b, a - 1),
    "min.u32": np.minimum,
    "max.s32": lambda a, b: np.maximum(a.astype(np.int32), b.astype(np.int32)),
    "xor.b32": np.bitwise_xor,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
}


@pytest.mark.parametrize("op", REDUCTIONS)
def test_red_async(op):
    before = "st.shared.v2.u32 [%r1], {%r10, %r11};"
    before = "mad.lo.u32 %r10, %tid, 33, 5; mov.u32 %r11, 9;" + before
    store = f"red.async.relaxed.cluster.{TELLS}.{op} [%r3], %r5, [%r4];"
    was = np.broadcast_to(33 * np.arange(32) + 5, (2, 32))
    for seed in range(4):
        y = remote(store, 128, seed, before)
        np.testing.assert_array_equal(y[..., 0], REDUCTIONS[op](was, SENT))
        assert (y[..., 1] == 9).all()


@pytest.mark.parametrize("wait", ["", WAIT.replace("0;", "1;")], ids=["none", "the phase before"])
def test_remote_stores_that_nobody_waits_for(wait):
    store = next(iter(STORES))
    found = [fault_of(lambda: remote(store, 256, seed, wait=wait)) for seed in range(20)]  # noqa: B023
    assert any(found)
    why = "may still be writing|under way|with no barrier|undefined"
    assert all(re.search(why, f) for f in found if f)


@pytest.mark.parametrize("op", ["st.async", "red.async.relaxed.cluster"])
def test_remote_stores_need_a_launch_in_clusters_be_they_of_one_cta(op):
    """As an H200 does: without, they are an illegal instruction."""
    kind = "u32" if op == "st.async" else "add.u32"
    body = f"""
        mov.u32 %r0, smem; setp.eq.u32 %p0, %tid, 0;
        @%p0 mbarrier.init.shared::cta.b64 [%r0], 1;
        @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0], 4;
        add.u32 %r1, %r0, 64; st.shared.u32 [%r1], 0; bar.sync 0; mov.u32 %r5, 7;
        @%p0 {op}.{TELLS}.{kind} [%r1], %r5, [%r0];
        {WAIT}
        ld.shared.u32 %r6, [%r1]; @%p0 st.global.u32 [%y], %r6;"""
    y = np.zeros(1, np.uint32)
    launch(kernel(body, "y"), [Out("y", y)], threads=32, cluster=1)
    assert y[0] == 7
    with pytest.raises(Fault, match="stores to a cluster, and the launch has none"):
        launch(kernel(body, "y"), [Out("y", y)], threads=32, cluster=None)


def test_remote_stores_tell_an_mbarrier_of_the_same_cta():
    store = next(iter(STORES)).replace("[%r4]", "[%r0]")
    with pytest.raises(Fault, match=r"stores to CTA \d and tells an mbarrier of CTA \d"):
        remote(store, 256, 0)


REFUSED = """
    st.async.release.gpu.global.b32 [%q1], %r1
    st.async.shared::cluster.mbarrier::complete_tx::bytes.b16 [%r1], %h1, [%r2]
    red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.min.u64 [%r1], %q1, [%r2]
"""


@pytest.mark.parametrize("code", [line.strip() for line in REFUSED.strip().split("\n")])
def test_what_is_no_instruction_is_refused(code):
    text = kernel(f"{code};", "x", registers=".local .align 8 .b8 own[8];")
    with pytest.raises(UnknownInstruction, match=re.escape(code.split()[0])):
        launch(text, [In("x", np.zeros(64))], threads=1)
