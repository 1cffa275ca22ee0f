"""What a GPU would get of our Triton kernels, executed: against the reference, in several schedules."""

import dataclasses
import functools
import itertools
import os
import random

import pytest
import torch

pytest.importorskip("triton")

from helped import with_helpers
from helpers import assert_contract
from lorafast.kernels.common.configs import SHARED_MEMORY, LaunchConfig
from lorafast.kernels.common.launch import INTERPRETED
from lorafast.kernels.lora_linear import forward
from lorafast.kernels.tables import table_of
from small_tiles import are_kernels, on_kernels

from lorafast.reference import keep_mask
from ptx.cases import KINDS, Case, shipped

if INTERPRETED:
    pytest.skip("needs a process without TRITON_INTERPRET", allow_module_level=True)

from ptx.executed import executed

pytestmark = pytest.mark.executed

SEEDS = range(5)
RESIDENT = (1, 2, 3, 4, 7)
"""CTAs that run at once, by seed: one, fewer than there are, as many."""


def check(case, seeds=SEEDS):
    """Every schedule gives the same bits, and they keep the contract."""
    call = case.call()

    def in_all_schedules(operations, cast):
        if not are_kernels(operations):
            return call(operations, cast)
        found = []
        for seed in seeds:
            with executed(case.arch, seed, RESIDENT[seed % len(RESIDENT)], sms=case.sms) as state:
                found.append(call(operations, cast))
            assert state.ran, "nothing was launched"
        assert all(same_bits(one, found[0]) for one in found), "schedules differ"
        return found[0]

    assert_contract(in_all_schedules, case.kernels(), case.dtype)


def same_bits(one, other):
    if not isinstance(one, torch.Tensor):
        return all(map(same_bits, one, other))
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def first_of(operation, arch, kind, **more):
    """The case of the first row of a table for this operation and kind, changed."""
    case = next(c for c in shipped(arch) if (c.operation, c.kind) == (operation, kind))
    return dataclasses.replace(case, **more)


SMALL = LaunchConfig(32, 64, 32, 16, 4, 3)
TMA = LaunchConfig(64, 64, 64, 16, 4, 3, descriptors=True, flatten=True, parts=2, masked_parts=2)


def small(arch, **more):
    """A GEMM in small tiles, by TMA where there is one."""
    config = TMA if arch >= 90 else SMALL
    return Case("linear_expand", arch, "bf16", config, 90, 136, 152, 16, **more)


def as_they_ship():
    """Operations in every kind. Quick tests have each of them on one of the architectures."""
    operations = ("shrink", "expand", "linear_expand", "expand_backward", "shrink_backward")
    for i, (operation, kind) in enumerate(itertools.product(operations, KINDS)):
        for j, arch in enumerate((80, 90)):
            marks = [pytest.mark.slow] * ((i + j) % 2)
            yield pytest.param(operation, kind, arch, marks=marks, id=f"{operation}-{kind}-{arch}")


@pytest.mark.parametrize(("operation", "kind", "arch"), [*as_they_ship()])
def test_each_kernel_as_it_ships(operation, kind, arch):
    check(first_of(operation, arch, kind))


@pytest.mark.parametrize("arch", [100, 120])
@pytest.mark.parametrize("operation", ["shrink", "linear_expand", "expand_backward"])
def test_each_kernel_as_it_ships_for_blackwell(operation, arch):
    check(first_of(operation, arch, "bf16"))


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_every_stage_of_the_gemm_is_filled_again(arch):
    case = first_of("linear_expand", arch, "bf16")
    c = case.config
    check(dataclasses.replace(case, K=(c.num_stages + 2) * c.block_k + 8), seeds=range(3))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("operation", ["shrink", "expand", "shrink_backward"])
@pytest.mark.parametrize("kind", ["bf16", "fp16+fp32"])
def test_dropout(operation, kind, arch):
    check(first_of(operation, arch, kind, dropout_p=0.3))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("r", [1, 16, 17, 64, 80])
def test_ranks_in_a_block_of_the_gemm_and_beyond(r, arch):
    check(dataclasses.replace(small(arch), r=r))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("operation", ["shrink", "expand", "expand_backward", "shrink_backward"])
@pytest.mark.parametrize("r", [1, 17, 64])
def test_ranks_of_the_skinny_kernels(operation, r, arch):
    rows = [row for row in table_of(arch)[operation] if row[0] == 16 and row[4] >= r]
    case = first_of(operation, arch, "bf16")
    check(dataclasses.replace(case, r=r, config=rows[0][5]), seeds=range(2))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_dx(dropout_p, arch):
    """The GEMM on Wᵀ, with the mask on its low-rank term."""
    check(dataclasses.replace(small(arch), transposed=True, bias=False, dropout_p=dropout_p))


@pytest.mark.parametrize("sizes", [(1, 136, 152), (90, 1, 152), (90, 136, 1), (37, 53, 71)])
@pytest.mark.parametrize("arch", [80, 90])
def test_rows_that_tma_cannot_read(sizes, arch):
    M, K, N = sizes
    check(dataclasses.replace(small(arch), M=M, K=K, N=N))


@pytest.mark.parametrize("arch", [80, 90])
def test_k_is_cut_where_tiles_are_few(arch):
    case = dataclasses.replace(small(arch), M=40, K=600, N=72, sms=8)
    check(case)
    with executed(arch, sms=8) as state:
        case.call()(case.kernels(), lambda t, to=case.dtype: t.to(to))
    assert any(dict(launch.signature)["partials_ptr"] != "constexpr" for launch, *_ in state.ran)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kind", ["bf16", "bf16+fp32"])
def test_helpers(monkeypatch, kind, arch):
    """They run ahead of who waits for them, whatever starts first and however many run at once."""
    with_helpers(monkeypatch, helpers=2, waves=1, programs=5)
    case = dataclasses.replace(small(arch), operation="lora_linear", kind=kind, M=200)
    check(case, seeds=range(10))


@pytest.mark.parametrize("waves", [0, 2, 4])
def test_helpers_that_miss_another_number_of_rounds(monkeypatch, waves):
    """The last round of 12 tiles is none, full, or for some of the programs."""
    with_helpers(monkeypatch, helpers=2, waves=waves, programs=5)
    check(dataclasses.replace(small(90), operation="lora_linear", M=200), seeds=range(5))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("resident", [1, 3, 4])
def test_a_gemm_on_fewer_sms_than_it_has_programs(monkeypatch, arch, resident):
    """It gives the same bits, also with as many programs as PyTorch's carve-out leaves SMs."""
    case = small(arch, sms=5)
    found, grids = [], []
    for left_free, at_once in ((0, 5), (0, resident), (2, 3)):
        monkeypatch.setattr(torch._C, "_get_sm_carveout_experimental", lambda n=left_free: n)
        with executed(arch, 3, at_once, sms=case.sms) as state:
            found.append(case.call()(case.kernels(), lambda t, to=case.dtype: t.to(to)))
        grids += [launch.grid[0] for launch, *_ in state.ran]
    assert grids == [5, 5, 3]
    assert same_bits(found[1], found[0])
    assert same_bits(found[2], found[0])


@pytest.mark.parametrize("arch", [80, 90])
def test_counters_are_left_as_they_were_found(monkeypatch, arch):
    """Two launches in a row on the same ones, not cleared between."""
    kept = torch.zeros(4096, dtype=torch.int32)
    monkeypatch.setattr(forward, "counters", lambda x, count: kept)
    with_helpers(monkeypatch, helpers=2, waves=1, programs=5)
    case = dataclasses.replace(small(arch), operation="lora_linear", M=200)
    found = []
    with executed(arch, seed=1, resident=3, writable=(kept,)) as state:
        for _ in range(2):
            found.append(case.call()(case.kernels(), lambda t, to=case.dtype: t.to(to)))
            assert not kept.any()
    assert len(state.ran) == 2
    assert same_bits(*found)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_the_mask_is_the_references_bit_for_bit(arch, bias):
    M, N = 37, 299
    seed = torch.tensor([2**62 + 12345])
    ones = functools.partial(torch.ones, dtype=torch.bfloat16)
    with executed(arch, seed=2):
        y = on_kernels().expand(
            ones(M, 2), ones(N, 2), 1.0, 0.3, seed, dtype=torch.bfloat16,
            bias=0 * ones(N) if bias else None,
        )  # fmt: skip
    assert torch.equal(y != 0, keep_mask(M, N, 0.3, seed))


IN_PAIRS = 90
LIKE_SM_80 = (86, 89)
"""Triton makes the same PTX for them."""


def same_on_sm_80(case):
    return dataclasses.replace(case, arch=80)


def made_before(arch):
    """Cases of which the PTX is that of an architecture before this one."""
    others = (80, *LIKE_SM_80[: LIKE_SM_80.index(arch)]) if arch in LIKE_SM_80 else ()
    return {same_on_sm_80(case) for other in others for case in shipped(other)}


def in_pairs(cases):
    """Of the cases some, by lot, in which each configuration meets each kind and each variant, and each
    kind each variant: what three of them do together is what two do."""

    def pairs(case):
        looped = case.operation == "linear_expand" and case.r > 16  # over blocks of the rank
        variant = case.operation, case.dropout_p, case.transposed, case.asked, looped
        return set(itertools.combinations((case.config, case.kind, variant), 2))

    left, met, taken = random.sample(cases, len(cases)), set(), []
    while left:
        case = max(left, key=lambda case: len(pairs(case) - met))
        met |= pairs(case)
        taken.append(case)
        left = [case for case in left if not pairs(case) <= met]
    return taken


def one_in(share, cases):
    """One in so many of each configuration's cases, by lot; of each at least one."""
    by_config = {}
    for case in cases:
        by_config.setdefault(case.config, []).append(case)
    lots = (random.sample(own, -(-len(own) // share)) for own in by_config.values())
    return list(itertools.chain.from_iterable(lots))


def lot_of(arch, cases):
    """What a run of the tests executes of an architecture; the next draws another."""
    if arch == IN_PAIRS:
        return in_pairs(cases)
    return one_in(8 if arch == 80 else 16, cases)


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_each_configuration_is_in_every_lot(arch):
    cases = list(shipped(arch))
    assert {(c.config, c.kind) for c in in_pairs(cases)} == {(c.config, c.kind) for c in cases}
    assert {c.config for c in lot_of(arch, cases)} == {c.config for c in cases}


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("operation", ["shrink", "expand", "linear_expand", "expand_backward",
                                       "shrink_backward", "lora_linear"])  # fmt: skip
def test_every_configuration_that_ships(operation, arch):
    """Of sm_90 in pairs of what it is launched with, of sm_80 in an eighth of it, of the others in a
    sixteenth, by lot, but at least once, one schedule each; in every variant that a layer launches, in
    two schedules, with EXECUTE=all, which make test-executed sets."""
    everything = os.environ.get("EXECUTE") == "all"
    known = made_before(arch)
    own = [case for case in shipped(arch) if case.operation == operation]
    if operation == "lora_linear" and arch != 90:
        assert not own
        pytest.skip("a layer in one launch has configurations for sm_90 alone")
    assert own
    cases = [case for case in own if same_on_sm_80(case) not in known]
    if not cases:
        pytest.skip("its PTX is that of an architecture before it, which is executed")
    if not everything:
        cases = lot_of(arch, cases)
    for i, case in enumerate(cases):
        print(case)  # shown with a failure
        check(case, seeds=(0, 1) if everything else (i % 2,))
