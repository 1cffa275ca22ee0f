"""Faults planted in the PTX of the fused ``linear_expand``: each is caught, or gives a wrong result.

The machine may need the right schedule: twenty are tried.
"""

import pytest
from linear_expand_cases import SCALING, Case, OnMachine, bits, hold
from on_machine import Fault, needs_nvcc, planted
from ptx.plant import EVERY, after, change, drop
from small_cases import KINDS, SEED

from lorafast.core.dtypes import wide

pytestmark = needs_nvcc
SEEDS = range(20)
CASES = {  # of several blocks of K, of ranks, of tiles, and of several shares each, in two calls
    "y": Case("bf16", 140, 330, 136, 40, splits=2),
    "y, the wide tile": Case("bf16", 70, 330, 136, 16, columns=256),
    "dx": Case("bf16", 70, 330, 136, 16, True, 0.3),
    "float16": Case("fp16+fp32", 40, 100, 72, 20),
}
ATOM = r"atom\.add"
ONE_FEWER = change(r"(add\.s32.*), 1;", r"\1, 2;")
TAIL = change(r"(cp\.async\.cg.*), 16, %r\d+;", r"\1, 16, 16;", EVERY)
FAULTS = {
    "y": {
        "the first block is not waited for": change(r"wait_group 1;", "wait_group 2;", 0),
        "a block fewer is waited for": change(r"wait_group 1;", "wait_group 2;", 1),
        "the first block is in no group": drop(r"commit_group", 0),
        "a block is in no group": drop(r"commit_group", -1),
        "ranks are overwritten while they are read": drop(r"bar\.sync", 0),
        "factors are read before they are there": drop(r"bar\.sync", 1),
        "no barrier before the first block is read": drop(r"bar\.sync", 2),
        "no barrier between blocks": drop(r"bar\.sync", 3),
        "counted before all have stored": drop(r"bar\.sync", 4),
        "parts are loaded before the count": drop(r"bar\.sync", 5),
        "a count that releases nothing": change(r"acq_rel", "acquire"),
        "a count that acquires nothing": change(r"acq_rel", "release"),
        "a CTA fewer is waited for": after(ATOM, ONE_FEWER),
        "the counter is not cleared": after(ATOM, drop(r"st\.global\.u32")),
        "all bytes of a tail are read": TAIL,
        "a slab is read before it is there": drop(r"bar\.warp\.sync", 1),
        "a slab is written over the one that is read": drop(r"bar\.warp\.sync", 2),
        "fragments exchanged": change(
            r"(mma\.sync\S* \{.*\}, \{)(%r\d+), (%r\d+)", r"\1\3, \2", -1
        ),
    },
    "y, the wide tile": {
        "a block fewer is waited for": change(r"wait_group 1;", "wait_group 2;", 1),
        "no barrier between blocks": drop(r"bar\.sync", 3),
        "a step reads the chunks of another": change(r"(xor\.b32.*), 64;", r"\1, 32;", -1),
    },
    "dx": {
        "no barrier between blocks": drop(r"bar\.sync", 3),
        "W is not transposed": change(r"\.trans", "", -1),
        "all bytes of a tail are read": TAIL,
        "a quad's masks are exchanged with the next quad's": change(r"sync\.bfly", "sync.up", 0),
        "half of a mask stays at home": change(r"sync\.bfly", "sync.down", 1),
    },
    "float16": {
        "factors are cut, not rounded": change(r"cvt\.rna\.tf32\.f32", "mov.b32", EVERY),
        "ranks are overwritten while they are read": drop(r"bar\.sync", 0),
        "no barrier before the first block is read": drop(r"bar\.sync", 2),
    },
}


def run(case, seed, edit=None):
    t = case.tensors()
    x, weight = t["x"].to(case.dtype), t["weight"].to(case.dtype)
    s, B = t["s"].to(wide(case.dtype)), t["lora_B"].to(KINDS[case.kind][1])
    machine = OnMachine(case, {"seed": seed, "resident": 1 + seed % 5, "edit": edit}, times=2)
    p = case.dropout_p
    return machine.linear_expand(
        x, weight, s, B, SCALING, None, p, SEED if p else None, transposed=case.transposed
    )


QUICK = (
    "no barrier between blocks",
    "a count that acquires nothing",
    "all bytes of a tail are read",
)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        pytest.param(name, fault, marks=() if fault in QUICK else pytest.mark.slow)
        for name, faults in FAULTS.items()
        for fault in faults
    ],
)
def test_caught(name, fault):
    case, edit = CASES[name], planted("linear_expand_kernel", FAULTS[name][fault])
    right = run(case, 0)
    for seed in SEEDS:
        try:
            found = run(case, seed, edit)
        except (Fault, AssertionError):
            return
        if not bits(found).equal(bits(right)):
            return
    pytest.fail(f"{fault}: no schedule of {len(SEEDS)} shows it")


@pytest.mark.parametrize("name", CASES)
def test_without_a_fault_it_passes(name):
    hold(CASES[name])
    right = run(CASES[name], 0)
    assert all(bits(run(CASES[name], seed)).equal(bits(right)) for seed in SEEDS[::4])
