"""Counts of csrc/cuda at full size: what is scaled up is what a launch executed whole gives."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from on_machine import needs_nvcc

from lorafast.backends.cost import Device
from lorafast.backends.cuda import clocks, cost
from ptx import counts, cuda_counts
from ptx.cuda_counts import Subject, Whole, whole_of
from ptx.cuda_launch import F16

pytestmark = needs_nvcc

SCALED = [
    Subject("shrink", "skinny", (256, 1024, 0, 16), dropout=True),
    Subject("shrink_backward", "skinny", (2048, 256, 0, 16)),
    Subject("expand_backward", "skinny", (512, 0, 1024, 16)),
    Subject("expand", "small", (512, 0, 256, 16), dropout=True),
    Subject("lora_linear", "small", (128, 576, 192, 16)),
    Subject("lora_linear", "decode", (16, 4096, 256, 16)),
    Subject("linear_expand", "linear_expand", (128, 1024, 256, 16), variant="forward"),
    Subject("mask", "mask", (64, 4096, 0, 0)),
]
HALVES = [
    dataclasses.replace(subject, dtype=F16, variant=variant)
    for subject, variant in zip(
        [*SCALED[:4], SCALED[3]], ["", "", "", "", "onto"], strict=True
    )
]  # fmt: skip
LONG = [
    Subject("shrink", "skinny", (512, 4096, 0, 64)),
    Subject("shrink_backward", "skinny", (2048, 1024, 0, 64), dropout=True),
    Subject("expand_backward", "skinny", (512, 0, 4096, 64)),
    Subject("expand_backward", "skinny", (4096, 0, 1024, 16)),
    Subject("expand", "small", (2048, 0, 1024, 64)),
    Subject("lora_linear", "decode", (1, 4096, 1024, 64)),
]


def named(subject):
    return f"{subject.family}-{subject.name}-{'x'.join(map(str, subject.sizes))}".replace(" ", "-")


def check(subject, arch):
    whole = whole_of(subject, arch)
    assert isinstance(whole, Whole), whole
    scaled, step, steps = cuda_counts.scaled(whole)
    found = whole.part()
    missed = {
        name: (scaled[name], found[name])
        for name in {*scaled, *found} - {"ahead"}
        if scaled[name] != pytest.approx(found[name], rel=1e-9, abs=1e-6)
    }
    assert not missed
    assert steps * step["tensor"] <= found["tensor"]


@pytest.mark.parametrize("subject", [SCALED[0], *SCALED[5:]], ids=named)
def test_scaled_is_whole(subject):
    check(subject, 80)


@pytest.mark.slow
@pytest.mark.parametrize("subject", SCALED[1:5], ids=named)
def test_other_kernels_scaled_are_whole(subject):
    check(subject, 80)


@pytest.mark.slow
@pytest.mark.parametrize("subject", HALVES, ids=named)
def test_scaled_is_whole_in_float16_on_sm_75(subject):
    check(subject, 75)


def test_a_row_of_sm_75():
    """float16 is multiplied by three parts of a float32 factor; a tile comes through registers."""
    row = cuda_counts.count(Subject("shrink", "skinny", (8192, 4096, 0, 16), dtype=F16), 75)
    assert row.variant == "float16"
    assert row.launch.multiplies == 3 * 8192 * 4096 * 16
    assert row.launch.sectors >= 8192 * 4096 * 2 / 32
    assert row.moved < 1.35 * row.least
    assert row.in_flight >= 8 << 10
    rates = counts.RATES[75]
    assert row.cycles["shared"] == pytest.approx(
        (row.tile.wavefronts + row.steps * row.step.wavefronts) * 128 / rates.shared
    )
    onto = cuda_counts.count(
        Subject("expand", "small", (512, 4096, 4096, 16), variant="onto", dtype=F16), 75
    )
    alone = cuda_counts.count(Subject("expand", "small", (512, 4096, 4096, 16), dtype=F16), 75)
    assert onto.moved - alone.moved == 2 * 512 * 4096
    assert onto.from_memory == alone.least + 2 * 512 * 4096
    two = Subject("expand_backward", "skinny", (8192, 0, 4096, 64), dtype=F16)
    with pytest.raises(RuntimeError, match="expand_backward float16 is 2 launches"):
        whole_of(two, 75)


def test_what_is_counted_of_sm_75():
    subjects = cuda_counts.subjects(75)
    assert {s.dtype for s in subjects} == {F16}
    assert {(s.operation, s.variant, s.dropout) for s in subjects} == {
        *itertools.product(("shrink", "shrink_backward", "expand"), ("",), (False, True)),
        *itertools.product(("expand",), ("onto",), (False, True)),
        ("expand_backward", "", False),
    }  # fmt: skip
    keys = [(s.name, counts.what_matters(s.operation, *s.sizes)) for s in subjects]
    assert len(set(keys)) == len(keys)
    said = cuda_counts.count(Subject("shrink", "skinny", (512, 4096, 0, 16)), 75)
    assert said == "compute capability is 7.5, the kernels of shrink in bfloat16 need 8.0"


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86])
@pytest.mark.parametrize("K", [512, 4096])
def test_a_fused_gemm_scaled_is_whole(K, arch):
    """Of sm_90 there is none."""
    check(Subject("linear_expand", "linear_expand", (256, K, 512, 64), True, "dx"), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("subject", LONG, ids=named)
def test_long_scaled_is_whole(subject, arch):
    check(subject, arch)


def test_a_row():
    row = cuda_counts.count(Subject("shrink", "skinny", (8192, 4096, 0, 16)), 80)
    assert (row.backend, row.launches, row.from_l2) == ("cuda", 1, False)
    # A CTA's steps make its share of all products, and x comes once in its walk.
    assert row.steps * row.tiles * row.step.multiplies == 8192 * 4096 * 16
    assert row.launch.multiplies == 8192 * 4096 * 16
    assert row.launch.sectors >= 8192 * 4096 * 2 / 32
    assert row.moved < 1.3 * row.least
    assert max(row.launch_cycles, key=row.launch_cycles.get) == "memory"
    assert row.in_flight >= 64 << 10
    assert 0 < row.registers <= 255


@pytest.mark.parametrize("M", [1, 16])
@pytest.mark.parametrize("arch", [80, 86, 90])
def test_decoding_reads_w_once_in_one_launch(M, arch):
    row = cuda_counts.count(Subject("lora_linear", "decode", (M, 4096, 4096, 16)), arch)
    W = 2 * 4096 * 4096
    assert W < row.least <= row.from_memory <= 1.02 * W
    assert row.launches == 1
    assert row.in_flight >= 40 << 10


SKINNY = [
    Subject("shrink", "skinny", (2048, 1024, 0, 16)),
    Subject("shrink_backward", "skinny", (2048, 1024, 0, 16)),
    Subject("expand_backward", "skinny", (2048, 0, 1024, 16)),
]


@pytest.mark.parametrize("subject", SKINNY, ids=named)
def test_no_bank_conflicts_and_no_sector_twice(subject):
    """Of x or dy every sector is copied once; beside it are the factors."""
    whole = whole_of(subject, 80)
    found, _, _ = cuda_counts.scaled(whole)
    assert found["its conflicts"] < 0.005 * found["its wavefronts"]
    # A with a tile's columns, s and ds with its rows; B is transposed on its way, by other loads.
    shared_by = whole.n["block_m" if subject.operation == "shrink" else "block_n"]
    assert found["copied"] == pytest.approx(2048 * 1024 / 16 * (1 + 16 / shared_by), rel=1e-6)


@pytest.mark.parametrize(
    ("arch", "M"), [(80, 1), (90, 8), (80, 16), pytest.param(86, 16, marks=pytest.mark.slow)]
)
def test_decoding_reads_no_sector_of_the_weights_twice(arch, M):
    K, N, r = 1024, 4096, 32
    whole = whole_of(Subject("lora_linear", "decode", (M, K, N, r)), arch)
    found, _, _ = cuda_counts.scaled(whole)
    streamed = sum(v for name, v in found.items() if name.startswith("streamed"))
    assert streamed == 2 * (N * K + r * (K + N)) / 32
    # x is read once for each 16 or 32 rows of W; the rest is y and what the warps' sums need.
    others = 32 * (found["its sectors"] - streamed) / whole.ctas
    assert others < 2 * M * K + 64 * (32 if M > 8 else 16) * 16 + 8192
    assert sum(found.amounts.issued.values()) / whole.ctas < 10_000
    assert found["its wavefronts"] / whole.ctas < 500


def test_a_is_read_by_every_cta_that_makes_its_own_s():
    K, N, r = 512, 256, 16
    whole = whole_of(Subject("lora_linear", "decode", (1, K, N, r)), 90)
    assert whole.n["helpers"] == 0
    streamed = sum(v for name, v in whole.part().items() if name.startswith("streamed"))
    assert 32 * streamed == 2 * (N * K + N // 16 * r * K + N * r)


@pytest.mark.parametrize(("M", "arch"), [(1, 90), pytest.param(16, 90, marks=pytest.mark.slow)])
def test_a_small_layer_reads_w_once_from_memory_too(M, arch):
    """Each CTA loads all of A, 32 KB beside as much of W, or twice that of 32 rows of W: from L2."""
    K = N = 1024
    row = cuda_counts.count(Subject("lora_linear", "decode", (M, K, N, 16)), arch)
    assert row.tiles == N // (16 if M == 1 else 32)  # there are no helpers
    again = (row.tiles - 1) * 2 * 16 * K
    assert row.moved > 2 * N * K + again
    assert row.from_memory == pytest.approx(row.least, rel=0.005)


SIZES = {
    (8192, 4096, 4096), (8192, 4096, 1024), (512, 4096, 4096), (1, 4096, 4096), (16, 4096, 4096)
}  # fmt: skip
"""The sizes that a record of counts must have, each at r = 16 and 64."""


def test_a_chip_has_the_memory_of_its_data_sheet():
    """T4, A100 (40 GB), RTX 3090, H100 SXM: GB/s, and the clock by which an SM's share is told."""
    sheets = {75: (320, 1.59), 80: (1555, 1.41), 86: (936, 1.70), 90: (3350, 1.83)}
    for arch, (bandwidth, clock) in sheets.items():
        assert counts.RATES[arch].memory * counts.SMS[arch] * clock == pytest.approx(bandwidth)
    assert 2 * counts.RATES[75].tensor * counts.SMS[75] * 1.59 == pytest.approx(65e3, rel=0.01)


def test_all_sizes_are_counted():
    assert {*counts.LAYERS, *counts.DECODED} >= SIZES
    assert {16, 64} <= {*counts.RANKS}
    subjects = cuda_counts.subjects()
    assert {(*layer, r) for layer in counts.DECODED for r in counts.RANKS} <= {
        s.sizes for s in subjects if s.family == "decode"
    }
    for operation in ("shrink", "shrink_backward", "expand", "expand_backward"):
        found = {
            counts.what_matters(s.operation, *s.sizes) for s in subjects if s.operation == operation
        }
        for layer in counts.LAYERS:
            assert {counts.what_matters(operation, *layer, r) for r in counts.RANKS} <= found


def newest_record():
    """Its rows of CUDA C++, by what they are of."""
    paths = (Path(__file__).parents[2] / "bench" / "results").glob("executed-*.json")
    newest = max((json.loads(path.read_text()) for path in paths), key=lambda run: run["started"])
    names = "operation", "variant", "capability", "M", "K", "N", "r"
    rows = (row for row in newest["executed"] if row["backend"] == "cuda")
    return {tuple(row[name] for name in names): row for row in rows}


def row_of(subject, arch):
    return subject.operation, subject.asked, arch, *subject.sizes


CLOCKS = {75: 1.59e9, 80: 1.41e9, 86: 1.70e9, 90: 1.83e9}
"""Of the cards whose rates the counts have."""


def card(arch):
    """One that reaches all that its data sheet says."""
    rates, sms, clock = counts.RATES[arch], counts.SMS[arch], CLOCKS[arch]
    flops = 2.0 * rates.tensor * sms * clock
    return Device("a card", arch, sms, flops, flops / 16, rates.memory * sms * clock)


def served(arch):
    """What is launched there: the fused ``linear_expand`` by ``mma.sync`` refuses sm_90, that by
    ``wgmma`` all others, and a layer may be one by one."""
    subjects = [
        (s, s.operation != "mask" and isinstance(cuda_counts.planned(s, card(arch)), str))
        for s in cuda_counts.subjects(arch)
    ]
    refused = {(s.family, s.operation) for s, is_refused in subjects if is_refused}
    small, in_one = ("small", "lora_linear"), ("wgmma", "lora_linear")
    expected = {("linear_expand", "linear_expand")} if arch == 90 else {("wgmma", "linear_expand")}
    assert refused <= {small, ("small", "expand"), in_one, *expected}
    return [s for s, is_refused in subjects if not is_refused]


def test_the_newest_record_has_every_kernel():
    """What misses it: ``lorafast bench --executed --json bench/results/executed-<day>.json``."""
    wanted = {row_of(s, arch) for arch in CLOCKS for s in served(arch)}
    assert not wanted - newest_record().keys()


@pytest.mark.parametrize("arch", CLOCKS)
def test_no_kernel_is_promised_to_take_less_than_was_counted(arch):
    record, checked = newest_record(), 0
    for subject in served(arch):
        if subject.operation == "mask" or subject.onto:  # parts of a plan
            continue
        counted = record[row_of(subject, arch)]["launch_cycles"]
        p = subject.problem()
        launch = cuda_counts.planned(subject, card(arch))
        takes = cost.of(launch, p, card(arch))
        assert takes.device > max(counted.values()) / CLOCKS[arch], subject
        if subject.family in ("skinny", "small") and subject.sizes[0] == 8192:
            busy = max(counted[unit] for unit in ("issue", "shared", "L2"))
            assert clocks.clocks(p, card(arch)) == pytest.approx(busy, rel=0.35), subject
        checked += 1
    assert checked > 30


def test_a_size_that_does_not_scale_is_refused():
    whole = whole_of(Subject("shrink", "skinny", (8192, 4000, 0, 16)), 80)
    with pytest.raises(RuntimeError, match="4000 is not a multiple of 128: a part does not scale"):
        cuda_counts.scaled(whole)


def test_what_a_family_refuses_is_said():
    said = cuda_counts.count(Subject("lora_linear", "decode", (17, 4096, 4096, 16)), 80)
    assert said == "x has 17 rows, the kernel for decoding takes at most 16"


def test_each_kernel_once_a_size():
    subjects = cuda_counts.subjects()
    keys = [(s.name, s.family, counts.what_matters(s.operation, *s.sizes)) for s in subjects]
    assert len(set(keys)) == len(keys)
    assert {s.operation for s in subjects} == {
        "shrink", "expand", "linear_expand", "expand_backward", "shrink_backward", "lora_linear", "mask",
    }  # fmt: skip


def test_registers_by_ptxas():
    text = """.version 8.0
.target sm_80
.address_size 64
.visible .entry nothing() { ret; }
"""
    assert 0 < cuda_counts.registers(text, 80) < 32
    with pytest.raises(RuntimeError, match="ptxas refuses what nvcc has made for sm_80"):
        cuda_counts.registers(text.replace("ret;", "no.such.instruction;"), 80)
