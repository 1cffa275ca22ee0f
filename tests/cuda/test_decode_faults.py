"""Faults planted in the PTX of the kernel for decoding: each is caught, by a fault or by a wrong result.

The machine may need the right schedule: twenty are tried. ``pytest -s`` prints how each was caught.
"""

import pytest
from decode_cases import F16, F32, KERNEL, LAST_FIRST, check, drawn
from on_machine import Fault, needs_nvcc, planted
from ptx.plant import EVERY, after, change, drop

pytestmark = needs_nvcc

SEEDS = range(20)
LAYERS = {
    # Three items of two shares each; three whole items for two helpers.
    "shares": (drawn(3, 520, 40, 33), 7, 80),
    "items": (drawn(3, 520, 40, 33), 2, 80),
    # CTAs with rows of W find that helpers haven't started.
    "late": (drawn(3, 520, 60, 33), 7, 80),
    "mixed": (drawn(5, 264, 40, 16, adapter_of=[1, -1, 0, 1, 2], n=3), 3, 90),
    "alone": (drawn(3, 264, 40, 33), 0, 90),
    "long": (drawn(9, 2312, 40, 16), 1, 90),
    "odd": (drawn(2, 37, 21, 3), 1, 80),
    "float16": (drawn(3, 520, 20, 16, F16, F32), 1, 80),
    "float32": (drawn(3, 1160, 20, 16, F32), 2, 75),
}

_CLEARED = r"st\.global\.u32 \s*\[%rd\d+{}\], %r\d+;"


def together(*edits):
    """One fault of several places."""
    return lambda lines: [change for edit in edits for change in edit(lines)]


FAULTS = {
    "the adapters are read before they are found": ("mixed", drop(r"bar\.sync", 0)),
    "a ticket is read before it is drawn": ("items", drop(r"bar\.sync", 4)),
    "helpers are looked for too early": ("late", drop(r"bar\.sync", 2)),
    "tickets that are left are nobody's": (
        "late",
        after(r"ld\.acquire", change(r"setp\.ge\.u32(.*), %r\d+;", r"setp.ge.u32\1, 0;"), 1),
    ),
    "the warps' sums of A are read too early": ("items", drop(r"bar\.sync", 5)),
    "a share counts before it is stored": ("shares", drop(r"bar\.sync", 6)),
    "the count of shares is read too early": ("shares", drop(r"bar\.sync", 7)),
    "s counts before it is stored": ("items", drop(r"bar\.sync", 8)),
    "s is read before it is stored": ("alone", drop(r"bar\.sync", 8)),
    "the warps' sums of W are read too early": ("odd", drop(r"bar\.sync", -1)),
    "shares release nothing": ("shares", change(r"add\.acq_rel", "add.relaxed", 0)),
    "s releases nothing": ("items", change(r"add\.acq_rel", "add.relaxed", 1)),
    "s is released to the CTA alone": ("items", change(r"acq_rel\.gpu", "acq_rel.cta", 1)),
    "nothing is acquired": ("items", change(r"ld\.acquire\.gpu", "ld.relaxed.gpu", EVERY)),
    "the count of s isn't looked at": (
        "items",
        after(r"ld\.acquire", change(r"setp\.ge\.u32(.*), %r\d+, ", r"setp.ge.u32\1, 99, "), 2),
    ),
    "a share fewer is waited for": ("shares", change(r"(add\.s32 .*), -1;", r"\1, -2;", -3)),
    "the count of shares stays": ("shares", drop(_CLEARED.format(""), 0)),
    "the count of tickets stays": ("items", drop(_CLEARED.format(""), -1)),
    "the count of s stays": ("items", drop(_CLEARED.format(r"\+8"), EVERY)),
    "the last CTA isn't known": (
        "items",
        change(r"(add\.s32 .*), -1;", r"\1, -4;", -1),
    ),
    # Each of them does what the other would.
    "a ticket is drawn over one that isn't read": (
        "late",
        together(drop(r"bar\.sync", 9), drop(r"bar\.sync", 3)),
    ),
    "float32: the warps' sums of W are read too early": ("float32", drop(r"bar\.sync", -1)),
    "float32: s is released to the CTA alone": (
        "float32",
        change(r"acq_rel\.gpu", "acq_rel.cta", 1),
    ),
    "float32: nothing is acquired": (
        "float32",
        change(r"ld\.acquire\.gpu", "ld.relaxed.gpu", EVERY),
    ),
    "float32: a factor is taken twice": (
        "float32",
        change(r"(fma\.rn\.f32 \s*%f\d+, %f\d+), %f\d+, (%f\d+)", r"\1, \2, \2", 0),
    ),
    "float16: a warp doesn't wait for the others' sums of A": ("float16", drop(r"bar\.sync", 5)),
    "float16: two fragments exchanged": (
        "float16",
        change(r"(mma\.\S+tf32\S* \{[^}]*\}, \{)(%r\d+), (%r\d+)", r"\1\3, \2", -1),
    ),
    "two fragments exchanged": (
        "long",
        change(r"(mma\.\S+ \{[^}]*\}, \{)(%r\d+), (%r\d+)", r"\1\3, \2", 0),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault):
    which, edit = FAULTS[fault]
    layer, helpers, arch = LAYERS[which]
    edits = (LAST_FIRST, edit) if which == "late" else (edit,)
    for seed in SEEDS:
        resident, fault_edit = 1 + seed % 5, planted(KERNEL, *edits)
        try:
            check(layer, helpers, arch, seed=seed, resident=resident, edit=fault_edit)
        except Fault as caught:
            how = str(caught)
        except AssertionError as wrong:
            how = "a wrong result: " + str(wrong).strip().split("\n")[0]
        else:
            continue
        print(f"{fault}: seed {seed}: {how}")
        return
    pytest.fail("no schedule shows it")


@pytest.mark.parametrize("which", LAYERS)
def test_without_a_fault_it_passes(which):
    layer, helpers, arch = LAYERS[which]
    edit = planted(KERNEL, LAST_FIRST) if which == "late" else None
    for seed in SEEDS[::4]:
        check(layer, helpers, arch, seed=seed, resident=1 + seed % 5, edit=edit)
