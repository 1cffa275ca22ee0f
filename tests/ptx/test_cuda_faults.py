"""Faults planted in what nvcc made of our kernels: each is caught, by a fault or by a wrong result.

The machine may need the right schedule: twenty are tried. ``pytest -s`` prints how each was caught.
"""

import functools

import numpy as np
import pytest

from .cuda_cases import (
    BF16,
    cluster_sum,
    exact,
    hand_over,
    integers,
    mma,
    multicast,
    needs_nvcc,
    running_sum,
    scale_bulk,
    sum_of,
    tcgen05,
    transpose,
    wgmma,
    wmma,
)
from .launch import Fault, Machine
from .plant import Planted, change, drop

pytestmark = needs_nvcc
SEEDS = range(20)
MOST_SILENT = 100_000
"""Steps in which nothing changes: more than a whole launch here takes, unless it hangs."""


def total(seed, **options):
    x = np.random.default_rng(0).integers(-9, 10, 1003).astype(np.float32)
    found = sum_of(x, seed, resident=1 + seed % 5, **options)
    assert found == x.sum(dtype=np.float64), f"{found} for {x.sum()}"


def product_mma(seed, **options):
    rng = np.random.default_rng(1)
    A, B = integers(rng, (70, 197), BF16), integers(rng, (45, 197), BF16)
    found, expected = mma(A, B, False, 80, seed, **options), (exact(A) @ exact(B).T).to(BF16)
    assert found.equal(expected), f"{int((found != expected).sum())} wrong elements"


def product_wgmma(seed, registers=False, **options):
    found, expected = wgmma(100, 72, 300, seed, registers, **options)
    assert found.equal(expected.to(BF16)), "a wrong product"


def product_tcgen05(seed, **options):
    found, expected = tcgen05(150, 72, 330, seed, **options)
    assert exact(found).equal(expected), "a wrong product"


def of(check, *arguments):
    return lambda seed, **options: check(*arguments, seed=seed, **options)


CASES = {  # kernel: a call of it that fails if its result is wrong
    "sum": total,
    "running_sum": running_sum,
    "cluster_sum": of(cluster_sum, "cluster_sum"),
    "cluster_sum_ptx": of(cluster_sum, "cluster_sum_ptx"),
    "product_wmma_bf16": of(wmma, "product_wmma_bf16", BF16, 80, (70, 72, 136)),
    "product_mma_bf16": product_mma,
    "scale_bulk": of(scale_bulk, 5556),
    "transpose_tensor": of(transpose, 100, 301),
    "copy_multicast": of(multicast, 100, 300),
    "product_wgmma": product_wgmma,
    "product_wgmma_registers": lambda seed, **options: product_wgmma(seed, True, **options),
    "product_tcgen05": product_tcgen05,
    "hand_over": of(hand_over, "hand_over", 3),
    "hand_over_fenced": of(hand_over, "hand_over_fenced", 5),
}
FAULTS = {
    "sum": {
        "no barrier before the warps' sums are read": drop(r"bar\.sync", 0),
        "no barrier before everyone asks who is last": drop(r"bar\.sync", 2),
        "the count is seen before the partial sum": drop(r"membar\.gl", 0),
        "the counter is not cleared": drop(r"st\.global\.u32"),
        "one block fewer is waited for": change(r"add\.s32(.*), -1;", r"add.s32\1, -2;", -1),
    },
    "running_sum": {
        "no barrier before the warps' sums are read": drop(r"bar\.sync", 0),
        "no barrier before they are added": drop(r"bar\.sync", 1),
        "sums of the lanes above": change(r"shfl\.sync\.up", "shfl.sync.down", 1),
    },
    "cluster_sum": {
        "the first CTA reads before the others wrote": drop(r"barrier\.cluster\.(arrive|wait)", 0),
        "CTAs end while they are read": drop(r"barrier\.cluster\.wait", -1),
    },
    "cluster_sum_ptx": {
        "writes to CTAs that may not run": drop(r"barrier\.cluster\.wait", 0),
        "a barrier that releases nothing": change(r"arrive\.release", "arrive.relaxed", 0),
        "CTAs end while they are read": drop(r"barrier\.cluster\.wait", -1),
    },
    "product_wmma_bf16": {
        "no wait for the first tile": change(r"wait_group 1", "wait_group 2"),
        "no commit": drop(r"cp\.async\.commit_group", 1),
        "no barrier before a tile is read": drop(r"bar\.sync", 0),
        "no barrier before it is written over": drop(r"bar\.sync", 1),
        "a staged fragment read too early": drop(r"bar\.warp\.sync", 0),
        "a staged fragment written over": drop(r"bar\.warp\.sync", 1),
    },
    "product_mma_bf16": {
        "a tile fewer is waited for": change(r"wait_group 1", "wait_group 2"),
        "no barrier in the loop": drop(r"bar\.sync", 0),
        "a chunk read beside its place": change(r"xor\.b32(.*), %r\d+;", r"add.s32\1, 0;", -1),
        # Before it are the copies of the two tiles ahead, and a loop's remainder that has nothing to do.
        "a tail's bytes are all read": change(r"(cp\.async\.cg.*), 16, %r\d+;", r"\1, 16, 16;", 17),
        "an accumulator's fragments exchanged": change(
            r"(mma\.sync\S* \{)(%f\d+), (%f\d+)", r"\1\3, \2", 0
        ),
    },
    "scale_bulk": {
        "a barrier of the ring initialised for one more": change(
            r"(mov\.u32 \s*%r\d+), 128;", r"\1, 129;", 0
        ),
        "buffers are not waited for": drop(r"mbarrier\.try_wait", 0),
        "data are not waited for": drop(r"mbarrier\.try_wait", 1),
        "fewer bytes expected": change(r"(expect_tx.*\], )(%r\d+);", r"\g<1>16;"),
        "no fence before the store": drop(r"fence\.proxy\.async"),
        "no barrier before the store": drop(r"bar\.sync", -1),
        "a store's buffer is written again": change(r"wait_group\.read 1", "wait_group.read 3"),
        "ends while stores read": drop(r"cp\.async\.bulk\.wait_group 0"),
        "buffers released early": change(r"(mbarrier\.try_wait.*), %r\d+;", r"\1, 1;", 0),
    },
    "transpose_tensor": {
        "a lane arrives for others that still read": drop(r"bar\.warp\.sync"),
        "another swizzle": change(r"xor\.b32(.*), %r\d+;", r"or.b32\1, 0;", -2),
        "no fence before the store": drop(r"fence\.proxy\.async"),
        "expects a row less": change(r"(mov\.u32 \s*%r\d+), 4096;", r"\1, 3968;"),
        "no commit of the store": drop(r"cp\.async\.bulk\.commit_group"),
    },
    "copy_multicast": {
        "sends before the other's barriers are there": drop(r"barrier\.cluster\.wait", 0),
        "ends before the other has": drop(r"barrier\.cluster\.wait", -1),
        "a lane arrives for others that still read": drop(r"bar\.warp\.sync", -1),
        "sends to itself alone": change(r"mov\.b16(.*), 3;|mov\.u16(.*), 3;", r"mov.u16\1\2, 1;"),
        "releases its own buffers alone": change(r"(mapa\.\S+ theirs, %r\d+), %r\d+;", r"\1, 0;"),
    },
    "product_wgmma": {
        "buffers released while they are multiplied": change(
            r"wgmma\.wait_group(\S*) 1", r"wgmma.wait_group\1 2"
        ),
        "sums stored while they are computed": drop(r"wgmma\.wait_group\S* 0"),
        "no fence before the first product": drop(r"wgmma\.fence", 0),
        "no fence before the store": drop(r"fence\.proxy\.async"),
        "tiles are not waited for": drop(r"bra again", -1),
        "half a step along K": change(r"4611686293305360386", "4611686293305360385", 0),
        "a stage too many": change(r"setp\.eq\.s32(.*), 3;", r"setp.eq.s32\1, 4;", 2),
        "the sums of the tile before stay": change(
            r"setp\.ne\.b32 add, .*, 0", "setp.eq.b32 add, 0, 0"
        ),
    },
    "product_wgmma_registers": {
        "fragments loaded over those in use": change(
            r"wgmma\.wait_group(\S*) 0", r"wgmma.wait_group\1 1"
        ),
        "a fragment of another row": change(r"(ldmatrix\S* \{)(%r\d+), (%r\d+)", r"\1\3, \2", 0),
    },
    "product_tcgen05": {
        "sums loaded before they are there": drop(r"mbarrier\.try_wait", -1),
        "columns are not deallocated": drop(r"tcgen05\.dealloc"),
        "the bias is not waited for": drop(r"tcgen05\.wait::st"),
        "another shape": change(r"(mov\.\S+ \s*%r\d+), 13\d{7};", r"\1, 118490256;"),
    },
    "hand_over": {
        "a flag that releases nothing": change(r"st\.release\.gpu", "st.relaxed.gpu"),
        "a flag that acquires nothing": change(r"ld\.acquire\.gpu", "ld.relaxed.gpu"),
        "a flag for the block alone": change(r"st\.release\.gpu", "st.release.cta"),
        "no barrier before the flag": drop(r"bar\.sync", 0),
    },
    "hand_over_fenced": {
        "no fence before the flag": drop(r"membar\.gl", 0),
        "no barrier before the numbers are read": drop(r"bar\.sync", 1),
    },
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Who hangs is found after fewer steps than a machine takes by itself."""
    made = functools.partialmethod(Machine.__init__, most_silent=MOST_SILENT)
    monkeypatch.setattr(Machine, "__init__", made)


@pytest.mark.parametrize(
    ("kernel", "fault"), [(kernel, fault) for kernel, faults in FAULTS.items() for fault in faults]
)
def test_a_fault_is_caught(kernel, fault):
    edit = Planted(kernel, (FAULTS[kernel][fault],))
    for seed in SEEDS:
        try:
            CASES[kernel](seed, edit=edit)
        except Fault as caught:
            how = str(caught)
        except AssertionError as wrong:
            how = "a wrong result: " + str(wrong).strip().split("\n")[0]
        else:
            continue
        print(f"{kernel}, {fault}: seed {seed}: {how}")
        return
    pytest.fail(f"no schedule shows it: {'; '.join(map(str, edit.changes))}")


@pytest.mark.parametrize("kernel", FAULTS)
def test_without_a_fault_it_passes(kernel):
    for seed in SEEDS[::4]:
        CASES[kernel](seed)
