"""The plans of the skinny operations, and what their launchers refuse."""

import itertools

import pytest
import torch
from on_machine import Fault, launched, needs_nvcc
from skinny_cases import BF16, F16, F32, PLANS, SCHEDULES, Case, bits, check, executed

from lorafast.backends.cost import Device
from lorafast.backends.cuda import skinny
from lorafast.backends.cuda.tables import SKINNY, row_of
from lorafast.core.problem import Problem

KINDS = ("shrink", "reduce", "backward")
SIZES = ((1, 1), (1, 4096), (8192, 4096), (8192, 1024), (100_000, 14336), (7, 100_000))


@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_fits_the_chip(kind, capability):
    row = row_of(SKINNY, capability)
    for dtype, r, (rows, columns), dropout in itertools.product(
        (BF16, F16, F32)[capability < 80 :], (1, 16, 17, 64, 256, 1000), SIZES, (False, True)
    ):
        s = skinny.shares_of(kind, dtype, rows, columns, r, row=row, sms=100, dropout=dropout)
        assert s.stages == 1 if capability < 80 else 2 <= s.stages <= 8
        needed = s.tile.bytes_of(s.stages) + 16  # the kernel's own
        assert needed <= row.shared
        assert s.ctas_per_sm * (needed + 1024) <= row.on_sm
        assert s.grid[2] * s.tile.ranks >= r
        along = columns if kind == "shrink" else rows
        block = s.tile.columns if kind == "shrink" else s.tile.rows
        assert (s.grid[1] - 1) * s.share * block < along <= s.grid[1] * s.share * block


def test_enough_is_in_flight_on_sm_90():
    row = row_of(SKINNY, 90)
    for kind, r in itertools.product(KINDS, (16, 32, 64)):
        for dtype in (BF16, F32):
            s = skinny.shares_of(kind, dtype, 8192, 4096, r, row=row, sms=132)
            assert s.in_flight >= 40 << 10, (kind, r, dtype)


def problem(operation, **changes):
    p = Problem(operation, 64, 64, 64, 8, BF16, BF16, torch.device("cpu"), wants=("ds", "dB"))
    return p._replace(**changes)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_where_less_is_in_flight_on_sm_90_it_is_all(kind, dropout):
    """512 x 4096 is 32 KB an SM."""
    s = skinny.shares_of(
        kind, BF16, 512, 4096, 16, row=row_of(SKINNY, 90), sms=132, dropout=dropout
    )
    ctas = s.grid[0] * s.grid[1] * s.grid[2]
    assert s.ctas_per_sm == -(-ctas // 132)  # no other comes
    assert s.in_flight >= 40 << 10 or s.stages - 1 >= s.share
    assert s.stages <= max(s.share + 1, 2)


def test_more_rank_blocks_where_ctas_are_few():
    """Not where each of them would read the large matrix from memory again."""
    row = row_of(SKINNY, 90)
    few = skinny.shares_of("backward", BF16, 8192, 1024, 64, row=row, sms=132)
    assert few.tile.ranks == 32
    assert few.grid == (4, 16, 2)
    assert few.partials * 4 < 8192 * 1024 * 2  # less than dy
    for columns in (4096, 14336):
        many = skinny.shares_of("backward", BF16, 8192, columns, 64, row=row, sms=132)
        assert many.tile.ranks == 64
        assert many.grid[2] == 1


@pytest.mark.parametrize("operation", PLANS)
def test_refusals_are_sentences(operation):
    def asked(capability=80, **changes):
        device = Device.known_by("a device", capability, 8)
        return PLANS[operation](problem(operation, **changes), device)

    need = f"the kernels of {operation}"
    assert asked(72) == f"compute capability is 7.2, {need} need 7.5"
    assert asked(75) == f"compute capability is 7.5, {need} in bfloat16 need 8.0"
    double = "torch.float64, the kernels have float16, bfloat16 and float32"
    assert asked(dtype=torch.float64) == f"the dtype is {double}"
    assert asked(adapter_dtype=torch.float64) == f"the adapter is {double}"
    assert asked(r=0) == "the rank is 0, the kernels need at least 1"


def test_a_plan_says_what_it_launches_and_moves():
    one = Case("expand_backward", 8192, 4096, 16, wants=("ds", "dB"), arch=90, sms=132).launch()
    assert one.line == (
        "expand_backward: 16 x 8 x 1 CTAs, tiles of 64 x 256 for 16 ranks, 4 stages"
    )
    assert one.launches == 1
    assert one.flops == 4 * 8192 * 4096 * 16
    dy, s, B = 8192 * 4096 * 2, 8192 * 16 * 2, 4096 * 16 * 2
    parts = 16 * 8192 * 16 * 4 + 8 * 4096 * 16 * 4
    assert one.moved == dy + 2 * s + 2 * B + 2 * parts


@needs_nvcc
def test_launches_of_two_callers_have_counters_of_their_own():
    """One call's launches between those of another, each on its own counters and scratch memory."""
    one, other = Case("shrink", 140, 900, 16), Case("shrink_backward", 900, 140, 16)
    given = {case: case.tensors() for case in (one, other)}
    alone = {case: executed(case)[0] for case in (one, other)}
    with launched(80, 5, 2, sms=8):
        found = [(case, case.run(given[case])) for case in (one, other, one, other)]
    for case, outputs in found:
        for name, tensor in outputs.items():
            assert bits(tensor).equal(bits(alone[case][name]))


MESSAGES = {
    "lora_A is 8 x 48, expected 8 x 64": {"lora_A": torch.zeros(8, 48, dtype=BF16)},
    "s has dtype float32, expected bfloat16": {"s": torch.zeros(40, 8)},
    "shrink has no tile of 64 x 128, for bfloat16 and 16 ranks it is 128 x 128": {"block_m": 64},
    "shrink has no kernel of 48 ranks for bfloat16, there are 16, 32, 64 and 128": {"ranks": 48},
    "stages is 9, expected 2 to 8": {"stages": 9},
    "share is 0, expected 1 to 1073741823": {"share": 0},
    "s is not aligned to 4 bytes": {"s": torch.zeros(321, dtype=BF16)[1:].view(40, 8)},
    "x has 1 dimensions, expected 2": {"x": torch.zeros(64, dtype=BF16)},
    "lora_A has 0 dimensions, expected 2": {"lora_A": torch.zeros((), dtype=BF16)},
    "partials is missing, expected": {"lora_A": torch.zeros(8, 512, dtype=BF16),
                                      "x": torch.zeros(40, 512, dtype=BF16)},
}  # fmt: skip


@needs_nvcc
@pytest.mark.parametrize("message", MESSAGES)
def test_launchers_check(message):
    arguments = {
        "x": torch.zeros(40, 64, dtype=BF16), "lora_A": torch.zeros(8, 64, dtype=BF16), "seed": None,
        "threshold": 0, "survivor_scale": 1.0, "scale": 1.0, "s": torch.zeros(40, 8, dtype=BF16),
        "partials": None, "counters": None, "ranks": 16, "block_m": 128, "block_n": 128, "stages": 3,
        "share": 1,
    }  # fmt: skip
    with launched(80) as run, pytest.raises(RuntimeError, match=message):
        torch.ops.lorafast_cuda.shrink(**arguments | MESSAGES[message])
    assert not run.launches


@needs_nvcc
@pytest.mark.parametrize(
    ("arch", "dtype", "ranks", "stages", "said"),
    [
        (75, F16, 16, 2, "stages is 2, expected 1 before compute capability 8.0"),
        (80, F16, 16, 1, "stages is 1, expected 2 to 8"),
        (75, BF16, 16, 1, "shrink of bfloat16 needs compute capability 8.0, and cuda has 7.5"),
    ],
)
def test_a_ring_is_for_those_who_have_one(arch, dtype, ranks, stages, said):
    x, A = torch.zeros(40, 64, dtype=dtype), torch.zeros(8, 64, dtype=dtype)
    s = torch.zeros(40, 8, dtype=torch.float32 if dtype is F16 else dtype)
    rows = 64 if dtype is F16 else 128
    with launched(arch) as run, pytest.raises(RuntimeError, match=said):
        torch.ops.lorafast_cuda.shrink(
            x, A, None, 0, 1.0, 1.0, s, None, None, ranks, rows, 128, stages, 1
        )
    assert not run.launches


@needs_nvcc
def test_a_tile_that_an_sm_has_no_room_for():
    """Of the backward of 64 ranks, which is never planned there."""
    dy, B = (torch.zeros(n, m, dtype=F16) for n, m in ((40, 128), (128, 64)))
    given = dy, torch.zeros(40, 64), B, 1.0, torch.zeros(40, 64), None, None
    # The launcher says so, or the machine where a larger chip was asked for the same kernel before.
    said = pytest.raises((RuntimeError, Fault), match="bytes of shared memory")
    with launched(75), said:
        torch.ops.lorafast_cuda.expand_backward(*given, None, None, 64, 32, 128, 1, 2, 1)


def test_without_a_ring_ds_may_be_a_launch_of_its_own():
    """Where a second pass over dy moves less than the parts of ds, which are read and written."""
    few, many = (Case("expand_backward", 8192, 4096, r, F16, arch=75, sms=40) for r in (16, 64))
    assert few.launch().launches == 1
    assert many.launch().launches == 2
    assert "shrink" not in few.launch().line
    dy = 8192 * 4096 * 2
    assert 2 * dy < many.launch().moved < 2.6 * dy


OF_BACKWARD = {
    "the rank is 0, expected at least 1": {"dB": torch.zeros(64, 0, dtype=BF16),
                                           "s": torch.zeros(40, 0, dtype=BF16)},
    "ds is not aligned to 4 bytes": {"ds": torch.zeros(321, dtype=BF16)[1:].view(40, 8)},
    "chunk is 1073741824, expected 1 to 1073741823": {"chunk": 1 << 30},
    "dy has 0 dimensions, expected 2": {"dy": torch.zeros((), dtype=BF16)},
    "ds has 1 dimensions, expected 2": {"ds": torch.zeros(40, dtype=BF16)},
    "dB has 1 dimensions, expected 2": {"dB": torch.zeros(64, dtype=BF16)},
}  # fmt: skip


@needs_nvcc
@pytest.mark.parametrize("message", OF_BACKWARD)
def test_the_launcher_of_expand_backward_checks(message):
    arguments = {
        "dy": torch.zeros(40, 64, dtype=BF16), "s": torch.zeros(40, 8, dtype=BF16),
        "lora_B": torch.zeros(64, 8, dtype=BF16), "scaling": 1.0, "ds": None,
        "dB": torch.zeros(64, 8, dtype=BF16), "dbias": torch.zeros(64, dtype=BF16),
        "partials": None, "counters": None, "ranks": 16, "block_m": 64, "block_n": 256, "stages": 2,
        "share": 1, "chunk": 1,
    }  # fmt: skip
    changed = arguments | OF_BACKWARD[message]
    if changed["ds"] is None:
        changed |= {"block_m": 128, "block_n": 128}
    with launched(80) as run, pytest.raises(RuntimeError, match=message):
        torch.ops.lorafast_cuda.expand_backward(**changed)
    assert not run.launches


@needs_nvcc
@pytest.mark.parametrize(("name", "size"), [("x", (64,)), ("x", ()), ("ds", (40,)), ("ds", ())])
def test_the_launcher_of_shrink_backward_checks(name, size):
    arguments = {
        "ds": torch.zeros(40, 8, dtype=BF16), "x": torch.zeros(40, 64, dtype=BF16), "seed": None,
        "threshold": 0, "survivor_scale": 1.0, "dA": torch.zeros(8, 64, dtype=BF16),
        "partials": None, "counters": None, "ranks": 16, "block_m": 128, "block_n": 128, "stages": 3,
        "share": 1,
    }  # fmt: skip
    arguments[name] = torch.zeros(size, dtype=BF16)
    with (
        launched(80),
        pytest.raises(RuntimeError, match=f"{name} has {len(size)} dimensions, expected"),
    ):
        torch.ops.lorafast_cuda.shrink_backward(**arguments)


@needs_nvcc
def test_scratch_that_is_not_contiguous():
    case = Case("shrink", 140, 900, 16)
    given, s = case.tensors(), torch.zeros(140, 16, dtype=BF16)
    for name in ("partials", "counters"):
        scratch = {"partials": torch.zeros(1 << 16), "counters": torch.zeros(64, dtype=torch.int32)}
        scratch[name] = torch.stack([scratch[name]] * 2, 1)[:, 0]
        with launched(80), pytest.raises(RuntimeError, match=f"{name} is not contiguous"):
            torch.ops.lorafast_cuda.shrink(
                given["large"], given["factor"], None, 0, 1.0, 1.0, s, *scratch.values(),
                16, 128, 128, 3, 1,
            )  # fmt: skip


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F16, F32])
@pytest.mark.parametrize("operation", PLANS)
def test_bits_of_every_schedule_in_other_dtypes(operation, dtype):
    one = Case(operation, 200, 300, 16, dtype=dtype)
    first, *others = (executed(one, *schedule, times=2)[0] for schedule in SCHEDULES)
    assert all(bits(first[name]).equal(bits(other[name])) for other in others for name in first)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [F16, F32])
@pytest.mark.parametrize("r", [3, 16, 17, 256])
@pytest.mark.parametrize("operation", PLANS)
def test_ranks_in_other_dtypes(operation, r, dtype, arch):
    check(Case(operation, 70, 72, r, dtype=dtype, arch=arch))


@needs_nvcc
@pytest.mark.parametrize("operation", PLANS)
def test_a_view_that_negates_is_read_as_its_values(operation):
    """Strides are never negative in PyTorch. What comes nearest it has, values that a view negates, and
    the dispatcher makes a tensor of them before a launcher sees it."""
    with pytest.raises(RuntimeError, match="Negative strides are not supported"):
        torch.as_strided(torch.zeros(4), (2,), (-1,), 3)
    one = Case(operation, 40, 64, 8, wants=("ds",))
    given = one.tensors()
    with launched(80, sms=8):
        found = one.run(given)
        negated = one.run(given | {"large": torch._neg_view(given["large"])})
    for name, tensor in found.items():
        assert negated[name].equal(-tensor)
        assert tensor.any()


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_at_random(seed):
    """Any sizes, dtypes, subsets, masks, schedules."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*of):
        return of[int(torch.randint(len(of), (1,), generator=generator))]

    operation = pick(*PLANS)
    outputs = ("ds", "dB", "dbias")
    check(
        Case(
            operation, pick(1, 5, 33, 64, 130, 300), pick(1, 7, 64, 129, 264, 600),
            pick(1, 2, 9, 16, 31, 50, 64, 100, 130, 256), pick(BF16, F16, F32), pick(BF16, F16, F32),
            0.0 if operation == "expand_backward" else pick(0.0, 0.25, 1.0),
            pick(outputs, outputs[:2], outputs[:1], outputs[1:], outputs[::2]),
            pick(80, 90), pick(1, 4, 16, 108),
        ),
        seed, pick(1, 2, 4, 64),
    )  # fmt: skip
