"""Faults planted in the PTX of the GEMMs of csrc/cuda/sm90.cuh: each is caught, or gives other bits.
Those of helpers are in test_lora_linear_sm90_faults.py.
"""

import pytest
from on_machine import needs_nvcc
from ptx.plant import EVERY, after, before, change, delay, drop, hoist
from sm90_cases import Case, bits_of, hold
from sm90_faults import Planting, no_wait

pytestmark = needs_nvcc

CASES = {
    "plain": Case("bf16", 200, 520, 136, 100, 128, bias=True, sms=2),
    "masked": Case("bf16", 70, 456, 264, 100, 128, dropout_p=0.3, sms=1),
    "long masked": Case("bf16", 70, 1032, 136, 16, 128, dropout_p=0.3, sms=1),
    "short masked": Case("bf16", 300, 64, 264, 16, 128, dropout_p=0.3, sms=1),
    "masked pair": Case("bf16", 520, 64, 264, 16, 128, dropout_p=0.3, sms=2, cluster=2),
    "short": Case("bf16", 300, 64, 264, 16, 128, bias=True, sms=1),
    "pair": Case("bf16", 300, 328, 136, 100, 128, bias=True, sms=2, cluster=2),
    "short pair": Case("bf16", 520, 64, 264, 16, 128, bias=True, sms=2, cluster=2),
    "pair across": Case("bf16", 200, 328, 264, 8, 128, sms=2, transposed=True, cluster=2),
}
BAR, WAIT, ARRIVE = r"bar\.sync", r"wgmma\.wait_group\.sync\.aligned", r"mbarrier\.arrive\.s"
MEET = r"barrier\.cluster\.(arrive|wait)"
RELEASE, PUBLISH = r"mbarrier\.arrive\.shared::cluster", r"fence\.proxy\.async"
SEED, ROW = r"ld\.global\.u64", r"cvt\.s64\.s32 \s*(%rd\d+), (%r\d+);"


def to_itself(nth):
    """Who would tell a CTA of its cluster tells its own. In the order of the text: 0 writers that are
    done with mail, 1 to 7 stages that are read, 8 the others that are done with mail."""
    return change(r"mapa\.shared::cluster\.u32 (%r\d+), (%r\d+), %r\d+;", r"mov.u32 \1, \2;", nth)


def half(bits, to):
    """What a CTA's number, moved by so many bits, becomes in the loading thread."""
    moved = change(rf"shl\.b32 (\s*%r\d+), (%r\d+), {bits};", to)
    return after(r"prefetch\.tensormap", moved, 2)


def expects(count):
    """So many bytes of a K block."""
    return change(r"(mov\.u32 \s*%r\d+), 32768;", rf"\1, {count};", EVERY)


# Waits in the order of the text: 0 a writer's mail, 1 its grant of a mask, 2 of ranks, 3 its next mail,
# 4 mail of who multiplies, 5 the first K block, 6 others, 7 a mask, 8 ranks under it, 9 ranks, 10 next
# mail; of the loading thread 11 to post, 12 its mail, 13 to load, 14 to grant.
FAULTS = {
    "who multiplies takes every turn of a stage for an even one": (
        "plain",
        change(r"(mbarrier\.try_wait\.parity[^;]*, )%r\d+;", r"\g<1>0;", 6),
    ),
    "barriers are used before they are initialised": ("plain", [drop(MEET, 0)] * 2),
    "only its own warps know that barriers are initialised": (
        "pair",
        [change(r"^.*barrier\.cluster\.arrive.*$", "bar.sync 0;", 0), drop(MEET, 0)],
    ),
    "it ends while the other CTA tells it of stages": ("pair", [drop(MEET, -1)] * 2),
    "both CTAs copy one half of W": ("pair", half(6, r"mov.u32 \1, 0;")),
    "both halves of W are copied to one place": ("pair", half(13, r"mov.u32 \1, 0;")),
    "across, the halves of W change places": (
        "pair across",
        [half(13, r"xor.b32 \1, \2, 1;\nshl.b32 \1, \1, 13;")],
    ),
    "W is copied to CTA 0 alone": ("pair", change(r"(mov\.u16 \s*%rs\d+), 3;", r"\1, 1;")),
    "W is copied to the other CTA alone": ("pair", change(r"(mov\.u16 \s*%rs\d+), 3;", r"\1, 2;")),
    "the other half of W isn't expected": ("pair", expects(24576)),
    "its own warps alone say that a stage is empty": ("pair", [to_itself(1)] * 7),
    "the warps of one CTA are enough for an empty stage": (
        "pair",
        before(r"fence\.mbarrier_init", change(r"(shl\.b32 \s*%r\d+, %r\d+), 3;", r"\1, 2;")),
    ),
    "stages that are read are told within one CTA": (
        "pair",
        change(r"arrive\.shared::cluster", "arrive.release.cta.shared::cluster", EVERY),
    ),
    "of stages that are read it hears within one CTA": (
        "pair",
        change(r"parity\.shared::cta", "parity.acquire.cta.shared::cta", 13),
    ),
    "readers of mail tell their own CTA": ("short pair", to_itself(8)),
    "writers that read mail tell their own CTA": ("short pair", to_itself(0)),
    "the readers of one CTA are enough for new mail": (
        "short pair",
        change(r"mul\.lo\.s32 (\s*%r\d+), %r\d+, 11;", r"mov.u32 \1, 11;"),
    ),
    "the leader alone gets mail": (
        "pair",
        after(r"st\.async", change(r"(setp\.lt\.s32 \s*%p\d+, %r\d+), %r\d+;", r"\1, 1;")),
    ),
    "mail counts no bytes": ("pair", drop(r"mbarrier\.arrive\.expect_tx\.shared::cluster")),
    "the loading thread reads mail before it is posted": ("pair", no_wait(12)),
    "a pair's stage is loaded before it is empty": ("pair", no_wait(13)),
    "ranks are handed over before they are written": ("plain", drop(BAR, 2)),
    "only one thread waits until a piece is free": ("plain", drop(BAR, 3)),
    "a piece of y is stored before it is written": ("plain", drop(BAR, 4)),
    "a piece of y is written while TMA reads it": ("plain", drop(r"bulk\.wait_group\.read", EVERY)),
    "ranks aren't published": ("plain", drop(PUBLISH, 1)),
    "copied ranks aren't waited for": ("short", drop(r"cp\.async\.wait_group", EVERY)),
    "y isn't published": ("plain", drop(PUBLISH, 2)),
    "stores of y are in no group": ("plain", drop(r"bulk\.commit_group", EVERY)),
    "it ends before y is stored": ("plain", drop(r"bulk\.wait_group 0")),
    "fewer bytes are expected": ("plain", expects(32640)),
    "more bytes are expected": ("plain", expects(32896)),
    "stages are released a product early": ("plain", change(rf"({WAIT}) 1", r"\1 2", EVERY)),
    "sums are stored before the last product": ("plain", change(rf"({WAIT}) 0", r"\1 1", -1)),
    "sums are added to before the last product": ("masked", change(rf"({WAIT}) 0", r"\1 1", 0)),
    "ranks are added before their product": ("short masked", change(rf"({WAIT}) 1", r"\1 2", 2)),
    "ranks are added before their products": ("masked", change(rf"({WAIT}) 1", r"\1 2", 3)),
    "the last ranks are added before their products": (
        "masked",
        change(rf"({WAIT}) 0", r"\1 1", 2),
    ),
    "products begin without a fence": ("plain", drop(r"wgmma\.fence", EVERY)),
    "K blocks are in no group": ("plain", drop(r"wgmma\.commit_group", 1)),
    "ranks are written without a grant": ("plain", no_wait(2)),
    "a mask is written without a grant": ("masked", no_wait(1)),
    "ranks are granted unseen": ("plain", no_wait(14)),
    "under a mask ranks are granted unseen": ("masked", no_wait(14)),
    "a mask is handed over before it is written": ("short masked", drop(BAR, 1)),
    "a mask isn't published": ("masked", drop(PUBLISH, 0)),
    "a mask is read before it is there": ("masked", no_wait(7)),
    "ranks under a mask are multiplied before they are there": ("masked", no_wait(8)),
    "who makes a mask never hears that a tile begins": ("long masked", drop(r"bar\.arrive")),
    "a mask's stage is released before it is read": (
        "masked",
        delay(r"ld\.shared\.u32", rf"{WAIT} 0"),
    ),
    "a mask's stage is never released": ("masked", after(r"ld\.shared\.u32", drop(RELEASE), 2)),
    "ranks under a mask are never released": ("masked", after(r"m64n64", drop(RELEASE), -1)),
    "every tile has the mask of the first columns": (
        "short masked",
        before(SEED, change(r"shr\.s32 (\s*%r\d+), %r\d+, 3;", r"mov.u32 \1, 0;", -1)),
    ),
    "a CTA has the mask of the other one's rows": (
        "masked pair",
        before(SEED, change(ROW, r"xor.b32 \2, \2, 128;\ncvt.s64.s32 \1, \2;", -4)),
    ),
    "a stage is loaded before it is empty": ("plain", no_wait(13)),
    "a stage is multiplied before it is full": ("plain", no_wait(6)),
    "ranks are multiplied before they are there": ("plain", no_wait(9)),
    "mail is overwritten": ("short", no_wait(11)),
    "mail is read before it is posted": ("plain", no_wait(10)),
    "writers read mail before it is posted": ("plain", no_wait(3)),
    "a slot is given back before its bias is read": ("short", hoist(ARRIVE, "stmatrix")),
    "a stage is never released": ("plain", after(rf"{WAIT} 1", drop(ARRIVE), 1)),
    "the counters stay": ("plain", drop(r"st\.global\.u32")),
    "the last CTA acquires nothing": ("plain", change(r"add\.acq_rel", "add.release")),
}

PLANTED = Planting("sm90_kernel", CASES, FAULTS, bits_of, hold, quick=3)


@pytest.mark.parametrize("fault", PLANTED.parameters())
def test_a_fault_is_caught(fault):
    PLANTED.catch(fault)


@pytest.mark.slow
@pytest.mark.parametrize("which", CASES)
def test_without_a_fault_it_passes(which):
    PLANTED.check_without_faults(which)
