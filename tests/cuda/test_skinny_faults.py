"""Faults planted in the skinny kernels' PTX: each is caught, by a fault or by a wrong result.

The machine may need the right schedule: twenty are tried.
"""

import pytest
from on_machine import Fault, needs_nvcc, planted
from ptx.plant import EVERY, after, before, change, drop
from skinny_cases import F16, F32, LAYOUTS, Case, bits, check, executed

pytestmark = needs_nvcc
SEEDS = range(20)
N = 530


def aligned(matrix):
    """Rows that are copied by cp.async; B's columns, which lie beside those of dy."""
    with_gaps = LAYOUTS["rows with a gap"]
    return with_gaps(matrix.t()).t() if matrix.shape[0] == N else with_gaps(matrix)


CASES = {  # the sums of each are shared by several CTAs, in two calls on the same counters
    "shrink": Case("shrink", 140, 900, 16, sms=4, lay_out=aligned),
    "dropout": Case("shrink", 140, 900, 16, dropout_p=0.2, lay_out=aligned),
    "expand_backward": Case("expand_backward", 300, N, 16, lay_out=aligned),
    "shrink_backward": Case("shrink_backward", 900, 140, 16, lay_out=aligned),
    "float32": Case("shrink_backward", 900, 140, 16, F32, dropout_p=0.2, lay_out=aligned),
    "float16": Case("shrink", 140, 900, 16, F16, F32, dropout_p=0.2, lay_out=aligned),
}
ATOM = r"atom\.add"
RELEASES_NOTHING = change(r"acq_rel", "acquire")
ACQUIRES_NOTHING = change(r"acq_rel", "release")
ONE_FEWER = change(r"(add\.s32.*), -1;", r"\1, -2;")
EXCHANGED = change(r"(mma\.\S+ \{[^}]*\}, \{)(%r\d+), (%r\d+)", r"\1\3, \2")
TAIL = change(r"(cp\.async\.cg.*), 16, %r\d+;", r"\1, 16, 16;", EVERY)
FAULTS = {
    "shrink": {
        "a tile fewer is waited for": change(r"wait_group 1;", "wait_group 2;"),
        "a tile is in no group": drop(r"commit_group", -1),
        "no barrier before a tile is read": drop(r"bar\.sync", 0),
        "the warps' sums are written over the ring": drop(r"bar\.sync", 1),
        "no barrier before the warps' sums are added": drop(r"bar\.sync", 2),
        "counted before all have stored": drop(r"bar\.sync", 3),
        "parts are loaded before the count": drop(r"bar\.sync", 4),
        "a count that releases nothing": RELEASES_NOTHING,
        "a count that acquires nothing": ACQUIRES_NOTHING,
        "a CTA fewer is waited for": after(ATOM, ONE_FEWER),
        "the counter is not cleared": drop(r"st\.global\.u32", -1),
        "all bytes of a tail are read": TAIL,
        "fragments exchanged": change(r"(mma\.sync\S* \{)(%f\d+), (%f\d+)", r"\1\3, \2"),
    },
    "dropout": {
        "a tile is dropped before it is there": change(r"wait_group 0;", "wait_group 1;"),
        "no barrier before a tile is read": drop(r"bar\.sync", 0),
    },
    "expand_backward": {
        "a tile fewer is waited for": change(r"wait_group 1;", "wait_group 2;"),
        "a tile is in no group": drop(r"commit_group", -1),
        "no barrier before B and a tile are read": drop(r"bar\.sync", 0),
        "the warps' sums are written over B": drop(r"bar\.sync", 1),
        "no barrier before the warps' sums are added": drop(r"bar\.sync", 2),
        "ds is counted before all have stored": drop(r"bar\.sync", 3),
        "parts of ds are loaded before the count": drop(r"bar\.sync", 4),
        "dB is counted before all have stored": drop(r"bar\.sync", 5),
        "parts of dB are loaded before the count": drop(r"bar\.sync", 6),
        "a count of ds that releases nothing": change(r"acq_rel", "acquire", 0),
        "a count of ds that acquires nothing": change(r"acq_rel", "release", 0),
        "a count of dB that releases nothing": change(r"acq_rel", "acquire", 1),
        "a count of dB that acquires nothing": change(r"acq_rel", "release", 1),
        "the counter of ds is not cleared": before(ATOM, drop(r"st\.global\.u32", -1), 1),
        "the counter of dB is not cleared": drop(r"st\.global\.u32", -1),
        "all bytes of a tail are read": TAIL,
    },
    "shrink_backward": {
        "a tile fewer is waited for": change(r"wait_group 1;", "wait_group 2;"),
        "a tile is in no group": drop(r"commit_group", -1),
        "no barrier before a tile is read": drop(r"bar\.sync", 0),
        "counted before all have stored": drop(r"bar\.sync", 1),
        "parts are loaded before the count": drop(r"bar\.sync", 2),
        "a count that releases nothing": RELEASES_NOTHING,
        "a count that acquires nothing": ACQUIRES_NOTHING,
        "the counter is not cleared": drop(r"st\.global\.u32", -1),
        "all bytes of a tail are read": TAIL,
    },
    "float32": {
        "a tile is dropped before it is there": change(r"wait_group 1;", "wait_group 2;"),
        "no barrier before a tile is read": drop(r"bar\.sync", 0),
        "counted before all have stored": drop(r"bar\.sync", -2),
        "parts are loaded before the count": drop(r"bar\.sync", -1),
        "a count that releases nothing": RELEASES_NOTHING,
        "the counter is not cleared": drop(r"st\.global\.u32", -1),
        "fragments exchanged": EXCHANGED,
    },
    "float16": {
        "a tile is dropped before it is there": change(r"wait_group 1;", "wait_group 2;"),
        "no barrier before a tile is read": drop(r"bar\.sync", 0),
        "no barrier before the warps' sums are added": drop(r"bar\.sync", 2),
        "a count that acquires nothing": ACQUIRES_NOTHING,
        "fragments exchanged": EXCHANGED,
    },
}


def run(case, seed, edit=None):
    return executed(case, seed, 1 + seed % 5, times=2, edit=edit)[0]


@pytest.mark.parametrize(
    ("name", "fault"), [(name, fault) for name, faults in FAULTS.items() for fault in faults]
)
def test_caught(name, fault):
    case, edit = CASES[name], planted("skinny_kernel", FAULTS[name][fault])
    right = run(case, 0)
    for seed in SEEDS:
        try:
            found = run(case, seed, edit)
        except (Fault, AssertionError):
            return
        if any(not bits(found[output]).equal(bits(right[output])) for output in right):
            return
    pytest.fail(f"{fault}: no schedule of {len(SEEDS)} shows it")


@pytest.mark.parametrize("name", CASES)
def test_without_a_fault_it_passes(name):
    right = check(CASES[name])
    for seed in SEEDS[::4]:
        found = run(CASES[name], seed)
        assert all(bits(found[output]).equal(bits(right[output])) for output in right)
