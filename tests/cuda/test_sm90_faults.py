"""Faults planted in the PTX of the GEMMs of csrc/cuda/sm90.cuh: each is caught, or gives other bits.

The machine may need the right schedule: twenty are tried. ``pytest -s`` prints how each was caught.
"""

import functools

import pytest
from on_machine import Fault, needs_nvcc, planted
from ptx.plant import EVERY, after, change, drop, hoist
from sm90_cases import Case, bits_of, hold, hold_layer, layer_bits_of

pytestmark = needs_nvcc

SEEDS = range(20)
CASES = {
    "plain": Case("bf16", 200, 520, 136, 100, 128, bias=True, sms=2),
    "masked": Case("bf16", 70, 456, 264, 100, 128, dropout_p=0.3, sms=1),
    "short": Case("bf16", 300, 64, 264, 16, 128, bias=True, sms=1),
    "layer": Case("bf16", 260, 200, 136, 16, 128, bias=True, sms=3, helpers=2),
}
BAR, WAIT, ARRIVE = r"bar\.sync", r"wgmma\.wait_group\.sync\.aligned", r"mbarrier\.arrive\.s"


def no_wait(nth):
    """Without a wait, and what it would have acquired.

    In the order of the text: 0 a writer's mail, 1 its grant, 2 its next mail, 3 mail of who multiplies;
    under a mask 4 ranks, 5 K blocks; else 6 the first K block, 7 others, 8 ranks; 9 next mail; of the
    loading thread 10 to grant under a mask, 11 to load, 12 to grant, 13 to post.
    """
    return [
        drop(statement, nth)
        for statement in (r"mbarrier\.try_wait", r"@over bra done", r"bra again")
    ]


def expects(count):
    """So many bytes of a K block."""
    return change(r"(mov\.u32 \s*%r\d+), 32768;", rf"\1, {count};", EVERY)


FAULTS = {
    "barriers are used before they are initialised": ("plain", drop(BAR, 0)),
    "ranks are handed over before they are written": ("plain", drop(BAR, 1)),
    "only one thread waits until a piece is free": ("plain", drop(BAR, 2)),
    "a piece of y is stored before it is written": ("plain", drop(BAR, 3)),
    "a piece of y is written while TMA reads it": ("plain", drop(r"bulk\.wait_group\.read", EVERY)),
    "ranks aren't published": ("plain", drop(r"fence\.proxy\.async", 0)),
    "copied ranks aren't waited for": ("short", drop(r"cp\.async\.wait_group", EVERY)),
    "y isn't published": ("plain", drop(r"fence\.proxy\.async", 1)),
    "stores of y are in no group": ("plain", drop(r"bulk\.commit_group", EVERY)),
    "it ends before y is stored": ("plain", drop(r"bulk\.wait_group 0")),
    "fewer bytes are expected": ("plain", expects(32640)),
    "more bytes are expected": ("plain", expects(32896)),
    "stages are released a product early": ("plain", change(rf"({WAIT}) 1", r"\1 2", EVERY)),
    "sums are stored before the last product": ("plain", change(rf"({WAIT}) 0", r"\1 1", -1)),
    "sums are masked before the last product": ("masked", change(rf"({WAIT}) 0", r"\1 1", 0)),
    "products begin without a fence": ("plain", drop(r"wgmma\.fence", EVERY)),
    "masked sums go on without a fence": ("masked", drop(r"wgmma\.fence", 1)),
    "K blocks are in no group": ("plain", drop(r"wgmma\.commit_group", 3)),
    "ranks are written without a grant": ("plain", no_wait(1)),
    "ranks are granted unseen": ("plain", no_wait(12)),
    "under a mask ranks are granted unseen": ("masked", no_wait(10)),
    "a stage is loaded before it is empty": ("plain", no_wait(11)),
    "a stage is multiplied before it is full": ("plain", no_wait(7)),
    "ranks are multiplied before they are there": ("plain", no_wait(8)),
    "mail is overwritten": ("short", no_wait(13)),
    "mail is read before it is posted": ("plain", no_wait(9)),
    "writers read mail before it is posted": ("plain", no_wait(2)),
    "a slot is given back before its bias is read": ("short", hoist(ARRIVE, "stmatrix")),
    "a stage is never released": ("plain", after(rf"{WAIT} 1", drop(ARRIVE), 3)),
    "the counters stay": ("plain", drop(r"st\.global\.u32")),
    "the last CTA acquires nothing": ("plain", change(r"add\.acq_rel", "add.release")),
    "a flag is raised before all have stored": ("layer", drop(BAR, -1)),
    "a flag releases nothing": ("layer", change(r"add\.acq_rel", "add.relaxed", 1)),
    "flags acquire nothing": ("layer", change(r"ld\.acquire\.gpu", "ld.relaxed.gpu", EVERY)),
    "one warpgroup's rows are enough": (
        "layer",
        after(r"ld\.acquire", change(r"setp\.gt\.u32(.*), 1;", r"setp.gt.u32\1, 0;")),
    ),
    "one writer alone waits for the flag": ("layer", drop(BAR, 1)),
    "flags stay": ("layer", drop(r"st\.global\.u32", EVERY)),
    "nobody is counted": ("layer", change(r"add\.acq_rel", "add.relaxed", 0)),
}
QUICK = 3
"""Of so many faults one is planted in quick tests."""


def bits(which, **options):
    """Of a case, by the launch that it is of."""
    return (layer_bits_of if which == "layer" else bits_of)(CASES[which], **options)


right = functools.cache(bits)
"""Those of every schedule."""


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(name, marks=[] if i % QUICK == 0 else pytest.mark.slow)
        for i, name in enumerate(FAULTS)
    ],
)
def test_a_fault_is_caught(fault):
    which, edit = FAULTS[fault]
    edits = edit if isinstance(edit, list) else [edit]
    expected, planting = right(which), planted("sm90_kernel", *edits)
    for seed in SEEDS:
        try:
            found = bits(which, seed=seed, resident=1 + seed % 3, edit=planting)
        except Fault as caught:
            how = str(caught)
        else:
            if found.equal(expected):
                continue
            how = "other bits"
        print(f"{fault}: seed {seed}: {how}")
        return
    pytest.fail("no schedule shows it")


@pytest.mark.slow
@pytest.mark.parametrize("which", CASES)
def test_without_a_fault_it_passes(which):
    (hold_layer if which == "layer" else hold)(CASES[which])
    for seed in SEEDS[::4]:
        assert bits(which, seed=seed, resident=1 + seed % 3).equal(right(which))
