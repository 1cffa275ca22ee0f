"""A layer's forward, with helpers and without."""

import dataclasses

import pytest
import torch
from helpers import Problem, assert_contract, problems
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

import numpy
from helped import with_helpers
from lorafast.kernels.common import counters
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.plan import forward_helpers, lora_linear_launch
from lorafast.kernels.lora_linear import forward
from small_tiles import SMALL_TILES, are_kernels, on_kernels
from triton.runtime import interpreter

from lorafast.reference import shrink

TILES = {name: config for name, config in SMALL_TILES.items() if config is not None}


def call(p, t):
    def run_call(run, cast):
        bias = cast(t.bias)
        lora_A, lora_B = cast(t.lora_A, p.adapter_dtype), cast(t.lora_B, p.adapter_dtype)
        x, weight = p.lay_out(cast(t.x)), p.lay_out(cast(t.weight))
        arguments = (x, weight, lora_A, lora_B, 0.7, bias, p.dropout_p, t.seed)
        if are_kernels(run):
            return run.lora_linear(*arguments)
        s = run.shrink(x, lora_A, p.dropout_p, t.seed)
        return run.linear_expand(x, weight, s, lora_B, 0.7, bias), s

    return run_call


@given(
    p=problems(),
    tiles=st.sampled_from(list(TILES)),
    helpers=st.integers(1, 4),
    waves=st.integers(0, 3),
    data=st.data(),
)
def test_helpers_against_the_reference(poisoned, device, p, tiles, helpers, waves, data):
    t = p.tensors(device)
    config = TILES[tiles]
    tile_count = -(-p.M // config.block_m) * -(-p.N // config.block_n)
    programs = data.draw(st.integers(helpers + 1, 7))
    waves = min(waves, tile_count // (programs - helpers))
    with pytest.MonkeyPatch.context() as monkeypatch:
        with_helpers(monkeypatch, helpers, waves, programs)
        kernels = on_kernels(lora_linear=config)
        assert_contract(call(p, t), kernels, p.dtype)


@pytest.mark.parametrize("order", ["backwards", "shuffled"])
def test_no_order_in_which_programs_start_is_assumed(monkeypatch, device, order):
    """One program at a time, each to its end: who waits for one that comes later never ends."""
    if device.type != "cpu":
        pytest.skip("the interpreter's order")
    p = Problem(150, 72, 88, 5, torch.float32, torch.float32, 0.0, "contiguous", 1)
    t = p.tensors(device)
    with_helpers(monkeypatch)
    kernels = on_kernels(lora_linear=TILES["16x16 tiles"])

    def run():
        return call(p, t)(kernels, lambda value, dtype=None: value.float())

    expected = run()
    begin = interpreter.InterpreterBuilder.set_grid_idx
    places = list(range(5))
    if order == "backwards":
        places.reverse()
    else:
        numpy.random.default_rng(0).shuffle(places)
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "set_grid_idx",
        lambda self, x, y, z: begin(
            self, places[x] if self.grid_dim[0] == len(places) else x, y, z
        ),
    )
    for one, two in zip(run(), expected, strict=True):
        assert torch.equal(one, two)


def test_the_counters_are_left_as_they_were_found(monkeypatch, device):
    kept = torch.zeros(4096, dtype=torch.int32, device=device)
    used = []

    def shared(x, count):
        used.append(count)
        return kept

    monkeypatch.setattr(forward, "counters", shared)
    with_helpers(monkeypatch)
    p = Problem(150, 72, 88, 5, torch.float32, torch.float32, 0.0, "contiguous", 1)
    t = p.tensors(device)
    kernels = on_kernels(lora_linear=TILES["16x16 tiles"])
    results = []
    for _ in range(3):
        results.append(call(p, t)(kernels, lambda value, dtype=None: value.float()))
        assert not kept.any()
    assert used
    for again in results[1:]:
        for one, two in zip(again, results[0], strict=True):
            assert torch.equal(one, two)


def test_counters_off_cuda_are_fresh():
    x = torch.ones(1)
    counters.counters(x, 3).add_(1)
    assert not counters.counters(x, 3).any()


def test_nan_propagates(monkeypatch, device):
    with_helpers(monkeypatch)
    p = Problem(40, 30, 25, 3, torch.float32, torch.float32, 0.0, "contiguous", 1)
    t = p.tensors(device)
    t.x[4, 5] = float("nan")
    kernels = on_kernels(lora_linear=TILES["16x16 tiles"])
    lost = [found.isnan() for found in call(p, t)(kernels, lambda v, _=None: v.float())]
    for output in lost:
        expected = torch.zeros_like(output)
        expected[4] = True
        assert torch.equal(output, expected)
    assert_contract(call(p, t), kernels, p.dtype)


def test_a_layer_without_helpers_is_its_operations(device):
    p = Problem(40, 30, 25, 3, torch.float32, torch.float32, 0.1, "contiguous", 1)
    t = p.tensors(device)
    x, lora_A = t.x.float(), t.lora_A.float()
    _, s = on_kernels().lora_linear(
        x, t.weight.float(), lora_A, t.lora_B.float(), 0.7, None, 0.1, t.seed
    )
    torch.testing.assert_close(s, shrink(x, lora_A, 0.1, t.seed))


CONFIG = LaunchConfig(128, 256, 64, 16, 8, 3, helpers=8)
SHRINK = LaunchConfig(64, 16, 128, 64, 4, 3)


@pytest.mark.parametrize(
    ("sizes", "helpers"),
    [
        ((8192, 4096, 4096, 16), True),
        ((8192, 4096, 14336, 16), True),
        ((512, 4096, 4096, 16), False),
        ((8192, 4096, 512, 16), False),
        ((8192, 4096, 4096, 17), False),  # a rank that the tiles loop over
        ((8192, 0, 4096, 16), False),
    ],
)
def test_helpers_work_where_they_can_pay(sizes, helpers):
    M, K, N, r = sizes
    found = forward_helpers(CONFIG, SHRINK, M, K, N, r, 2, False, 132)
    assert (found is not None) is helpers
    if found is not None:
        tiles = -(-M // 128) * -(-N // 256)
        assert found.helpers == 8
        assert found.programs == 132
        assert 0 < found.waves * (found.programs - found.helpers) <= tiles / 2 + 132


def launch_of(r, config=CONFIG, **others):
    options = {"sms": 132, "dtype": torch.bfloat16, "precision": "ieee", "tma": False}
    return lora_linear_launch(config, SHRINK, 8192, 4096, 4096, r, **options | others)


def test_a_mask_has_no_helpers():
    """It would keep them too long."""
    assert launch_of(16) is not None
    assert launch_of(16, dropout=True) is None


def test_a_helper_has_all_ranks_in_one_block():
    """It reads x once. So have the tiles beside it."""
    wide = dataclasses.replace(CONFIG, block_r=128)
    assert SHRINK.block_r == 64
    assert launch_of(64, wide) is not None
    assert launch_of(65, wide) is None
    assert launch_of(16) is not None
    assert launch_of(17) is None


def test_float16_has_no_helpers():
    """Its skinny work is in float32."""
    assert launch_of(16, dtype=torch.float16) is None


def test_helpers_have_the_rounds_that_cost_no_other_program_one():
    """More of them than the skinny work needs, in case memory is slower than it was taken to be."""
    product, sizes = dataclasses.replace(CONFIG, helpers=64), (8192, 4096, 4096, 16, 2, False, 132)
    found = forward_helpers(product, SHRINK, *sizes)
    tiles, others = 64 * 16, 132 - 64

    def rounds(waves):
        return waves + -(-(tiles - waves * others) // 132)

    assert rounds(found.waves + 1) > found.rounds
    # So many read all that memory gives, in 64 / 44 of the time of an item.
    assert (found.waves, found.alone) == (0, 8)
    assert found.rounds == pytest.approx(8 + 64 / 44 * 2 * 97 / 512)
    fewer = forward_helpers(dataclasses.replace(CONFIG, helpers=16), SHRINK, *sizes)
    assert (fewer.waves, fewer.rounds) == (2, 8)


def test_few_columns_have_many_helpers_or_none():
    """Two rounds of tiles, of which none can be missed."""
    sizes = (8192, 4096, 1024, 16, 2, False, 132)
    many = dataclasses.replace(CONFIG, helpers=64)
    found = forward_helpers(many, SHRINK, *sizes)
    assert (found.waves, found.alone) == (0, 2)
    assert 2.5 < found.rounds < 2.6
    assert forward_helpers(CONFIG, SHRINK, *sizes) is None


def test_zero_helpers_are_allowed():
    none = dataclasses.replace(CONFIG, helpers=0)
    assert forward_helpers(none, SHRINK, 8192, 4096, 4096, 16, 2, False, 132) is None


def test_without_helpers_the_gemm_has_one_output(monkeypatch, device):
    """Not a second one beside it, which would be the layer's largest piece of memory."""
    p = Problem(40, 30, 25, 3, torch.float32, torch.float32, 0.0, "contiguous", 1)
    t = p.tensors(device)
    made = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(a[0]) or empty(*a, **k))
    call(p, t)(on_kernels(), lambda value, dtype=None: value.float())
    assert made.count((p.M, p.N)) == 1
