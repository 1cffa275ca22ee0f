"""Faults planted in the PTX of csrc/cuda/lora_linear_backward_sm90.cu, in what it has beside its GEMM's:
each is caught, or gives other bits. Those of the GEMM are in test_sm90_faults.py.
"""

import functools

import pytest
from on_machine import needs_nvcc
from ptx.plant import EVERY, after, before, change, delay, drop
from sm90_backward_cases import Case, bits_of, hold
from sm90_faults import WAIT_FOR_BARRIER, Planting

pytestmark = needs_nvcc

CASES = {
    "long": Case("bf16", 300, 520, 520, 40, 3, 3, helpers=2, sms=3),
    "short": Case("bf16", 300, 256, 64, 40, 3, 3, helpers=1, sms=2),
    "ahead": Case("bf16", 1280, 8, 8, 40, helpers=10, sms=10),
    "pairs": Case("bf16", 640, 264, 264, 40, helpers=2, sms=4, cluster=2),
    "groups": Case("bf16", 260, 72, 520, 40, 1, 1, helpers=2, sms=3),
}
# Statements by what is found in these kernels' own parts alone: bar.arrive hands over buffers of
# factors, at first (0) by writers, then (1 to 3) by those who multiply for dA, then (4 to 6) for dB.
BAR, ARRIVE, WAIT = r"bar\.sync", r"bar\.arrive", r"wgmma\.wait_group\.sync\.aligned"
COPIES, PUBLISH, COUNTED = r"cp\.async\.wait_group", r"fence\.proxy\.async", r"atom\.add\.acq_rel"
EXPECT, PARTS = r"mbarrier\.expect_tx\.relaxed", r"st\.global\.v4\.f32"
OF_DA, OF_DB = 2, 5


def relaxed(*places):
    """Without release and acquire."""
    return functools.reduce(
        lambda edit, place: after(place[0], edit, place[1]),
        reversed(places),
        change(r"add\.acq_rel", "add.relaxed"),
    )


FAULTS = {
    "B is published before it is there": ("long", change(f"{COPIES} 1", "cp.async.wait_group 2")),
    "the last B is published before it is there": ("long", drop(f"{COPIES} 0", 1)),
    "s is published before it is there": ("long", drop(f"{COPIES} 0", 0)),
    "s isn't published": ("long", after(COPIES, drop(PUBLISH))),
    "B isn't published": ("long", after(COPIES, drop(PUBLISH), 1)),
    "B is handed over by one who wrote it": ("long", after(f"{COPIES} 1", drop(BAR))),
    "the last B is handed over by one who wrote it": ("long", after(COPIES, drop(BAR), 2)),
    "s is multiplied before it is written": ("long", after(ARRIVE, drop(BAR), OF_DB)),
    "ds is multiplied before it is written": ("long", after(ARRIVE, drop(BAR), OF_DA)),
    "factors are overwritten while they are multiplied": (
        "long",
        [*(drop(ARRIVE, nth) for nth in range(6, 0, -1)), before(r"cp\.async\.cg", drop(BAR, -2))],
    ),
    "a factor is written where y is stored": (
        "short", before(ARRIVE, drop(r"bulk\.wait_group\.read 0", -1), 1),
    ),
    "y is staged where a factor is multiplied": ("ahead", after(ARRIVE, drop(BAR), OF_DB + 1)),
    "a stage is given back a product early": (
        "long", after(ARRIVE, change(f"({WAIT}) 0", r"\1 1"), OF_DB),
    ),
    "dA's products begin without a fence": ("long", after(ARRIVE, drop(r"wgmma\.fence"), OF_DA)),
    "bytes beside B aren't expected": ("long", drop(EXPECT)),
    "a stage is shared before it is empty": (
        "long", [before(EXPECT, drop(line, -1)) for line in WAIT_FOR_BARRIER],
    ),
    "parts of dA aren't released": ("groups", relaxed((ARRIVE, 3), (PARTS, 0))),
    "parts of dB aren't released": ("groups", relaxed((ARRIVE, 6), (BAR, 0), (PARTS, 0))),
    "a part of ds isn't released": ("groups", relaxed((ARRIVE, 6), (PARTS, 0))),
    "parts of ds are counted by one lane": (
        "groups", after(ARRIVE, after(PARTS, drop(r"bar\.warp\.sync")), 6),
    ),
    "others' parts of ds aren't acquired": (
        "groups",
        after(ARRIVE, after(PARTS, change(r"add\.acq_rel", "add.release")), 6),
    ),
    "ds isn't released": ("groups", relaxed((ARRIVE, 6), (COUNTED, 0))),
    "a row block's flag is raised early": (
        "groups",
        after(ARRIVE, after(COUNTED, delay(r"st\.global\.u32", COUNTED)), 6),
    ),
    "dA's factor is read before its flag": (
        "groups", before(ARRIVE, change(r"ld\.acquire\.gpu", "ld.relaxed.gpu", EVERY), 1),
    ),
    "one writer alone waits for a flag of dA's": (
        "groups", before(r"cp\.async\.cg", drop(BAR, -1)),
    ),
    "mail is overwritten before the other CTA's loading thread has it": (
        "pairs", [after(r"setmaxnreg\.inc", drop(line, 1)) for line in WAIT_FOR_BARRIER],
    ),
    "counters stay": ("groups", after(COUNTED, drop(r"st\.global\.u32", EVERY), -1)),
}  # fmt: skip

PLANTED = Planting("backward_sm90_kernel", CASES, FAULTS, bits_of, hold, quick=7)


@pytest.mark.parametrize("fault", PLANTED.parameters())
def test_a_fault_is_caught(fault):
    PLANTED.catch(fault)


@pytest.mark.slow
@pytest.mark.parametrize("which", CASES)
def test_without_a_fault_it_passes(which):
    PLANTED.check_without_faults(which)
