"""Faults planted in what helpers do in csrc/cuda/lora_linear_sm90.cu: each is caught, or changes bits.

Those of the ring and of the tiles are in test_sm90_faults.py.
"""

import pytest
from on_machine import needs_nvcc
from ptx.plant import EVERY, after, change, drop
from sm90_faults import Planting, no_wait
from sm90_forward_cases import Layer, bits_of, hold

pytestmark = needs_nvcc

CASES = {
    "plain": Layer("fp32", 140, 520, 136, 60, 128, bias=True, ctas=3, helpers=2),
    "dropped": Layer("bf16", 140, 520, 136, 16, 128, 0.3, ctas=3, helpers=2),
    "pair": Layer("fp32", 300, 200, 136, 16, 128, 0.3, ctas=4, helpers=2, cluster=2),
}
BAR, WAIT, ARRIVE = r"bar\.sync", r"wgmma\.wait_group\.sync\.aligned", r"mbarrier\.arrive\.s"
FENCE = r"fence\.proxy\.async"
SIXTEEN_KB = r"(mov\.u32 \s*%r\d+), 16384;"

# Waits in the order of the text: 2 the grant of a stage of A, 5 a full stage of who multiplies; 12 of
# the loading thread, an empty one.
FAULTS = {
    "A is written without a grant": ("plain", no_wait(2)),
    "x is loaded before the stage is empty": ("plain", no_wait(12)),
    "x isn't expected": ("plain", drop(r"mbarrier\.expect_tx")),
    "fewer bytes of x are expected": ("plain", change(SIXTEEN_KB, r"\1, 16256;", EVERY)),
    "more bytes of x are expected": ("plain", change(SIXTEEN_KB, r"\1, 16512;", EVERY)),
    "A isn't granted": ("plain", after(r"mbarrier\.expect_tx", drop(ARRIVE))),
    "A isn't published": ("plain", drop(FENCE, 1)),
    "A is handed over before all have written": ("plain", drop(BAR, 2)),
    "A is never handed over": ("plain", after(BAR, drop(ARRIVE), 2)),
    "x and A are multiplied before they are there": ("plain", no_wait(5)),
    "x is dropped before it is there": ("dropped", no_wait(5)),
    "a dropped x isn't published": ("dropped", drop(FENCE, 2)),
    "a dropped x is multiplied before all have dropped": ("dropped", drop(BAR, 3)),
    "a column of the mask is another's": (
        "dropped", change(r"shl\.b32(.*), 16;", r"shl.b32\1, 15;", EVERY),
    ),
    "the mask is another function": ("dropped", change(r", -766435501;", ", -766435503;", EVERY)),
    "products of s begin without a fence": ("plain", drop(r"wgmma\.fence", 0)),
    "products of s are in no group": ("plain", drop(r"wgmma\.commit_group", 0)),
    "s is stored before its last product": ("plain", change(rf"({WAIT}) 0", r"\1 1", 0)),
    "a stage of x is released a product early": ("dropped", change(rf"({WAIT}) 1", r"\1 2", 0)),
    "a stage of x is never released": ("plain", after(rf"{WAIT} 1", drop(ARRIVE))),
    "a row block's last stage is kept": ("plain", after(rf"{WAIT} 0", drop(ARRIVE))),
    "a flag is raised before all have stored": ("plain", drop(BAR, -1)),
    "a flag releases nothing": ("plain", change(r"add\.acq_rel", "add.relaxed", 0)),
    "flags acquire nothing": ("plain", change(r"ld\.acquire\.gpu", "ld.relaxed.gpu", EVERY)),
    "one warpgroup's rows are enough": (
        "plain", after(r"ld\.acquire", change(r"setp\.gt\.u32(.*), 1;", r"setp.gt.u32\1, 0;")),
    ),
    "one writer alone waits for the flag": ("plain", drop(BAR, 0)),
    "flags stay": ("plain", after(r"barrier\.cluster", drop(r"st\.global\.u32", EVERY), -1)),
    "nobody is counted": ("plain", change(r"add\.acq_rel", "add.relaxed", 1)),
    "a pair's A is handed over before all have written": ("pair", drop(BAR, 2)),
    "a pair's stage is released in one CTA alone": (
        "pair", change(r"(mapa\.shared::cluster\.u32 .*), %r\d+;", r"\1, 0;", EVERY),
    ),
}  # fmt: skip

PLANTED = Planting("sm90_kernel", CASES, FAULTS, bits_of, hold, quick=8)


@pytest.mark.parametrize("fault", PLANTED.parameters())
def test_a_fault_is_caught(fault):
    PLANTED.catch(fault)


@pytest.mark.slow
@pytest.mark.parametrize("which", CASES)
def test_without_a_fault_it_passes(which):
    PLANTED.check_without_faults(which)
