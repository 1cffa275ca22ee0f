"""A whole layer's launches, with helpers and without."""

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
from lorafast.kernels.common.plan import (
    backward_helpers,
    forward_helpers,
    lora_linear_backward_launch,
    lora_linear_launch,
)
from lorafast.kernels.lora_linear import backward, forward
from small_tiles import SMALL_TILES, on_kernels
from triton.runtime import interpreter

from lorafast.reference import shrink, wide

TILES = {name: config for name, config in SMALL_TILES.items() if config is not None}


def call_forward(p, t):
    def run_call(run, cast):
        bias = cast(t.bias)
        lora_A, lora_B = cast(t.lora_A, p.adapter_dtype), cast(t.lora_B, p.adapter_dtype)
        x, weight = p.lay_out(cast(t.x)), p.lay_out(cast(t.weight))
        arguments = (x, weight, lora_A, lora_B, 0.7, bias, p.dropout_p, t.seed)
        if hasattr(run, "lora_linear_backward"):
            return run.lora_linear(*arguments)
        s = run.shrink(x, lora_A, p.dropout_p, t.seed)
        return run.linear_expand(x, weight, s, lora_B, 0.7, bias), s

    return run_call


def call_backward(p, t):
    def run_call(run, cast):
        lora_A, lora_B = cast(t.lora_A, p.adapter_dtype), cast(t.lora_B, p.adapter_dtype)
        x, dy = p.lay_out(cast(t.x)), p.lay_out(cast(t.dy))
        weight, s = p.lay_out(cast(t.weight)), cast(t.s, wide(p.dtype))
        if hasattr(run, "lora_linear_backward"):
            return run.lora_linear_backward(
                dy, x, weight, lora_A, lora_B, s, 0.7, p.dropout_p, t.seed, dbias=True
            )
        ds, dB = run.expand_backward(dy, s, lora_B, 0.7)
        dA = run.shrink_backward(ds, x, p.dropout_p, t.seed, lora_A.dtype)
        dx = run.linear_expand(dy, weight.t(), ds, lora_A.t(), 1.0, None, p.dropout_p, t.seed)
        return dx, dA, dB, dy.sum(0)

    return run_call


CALLS = {"forward": call_forward, "backward": call_backward}


@pytest.mark.parametrize("call", CALLS)
@given(
    p=problems(),
    tiles=st.sampled_from(list(TILES)),
    helpers=st.integers(1, 4),
    waves=st.integers(0, 3),
    data=st.data(),
)
def test_helpers_against_the_reference(poisoned, device, call, p, tiles, helpers, waves, data):
    t = p.tensors(device)
    config = TILES[tiles]
    tile_count = -(-p.M // config.block_m) * -(
        -(p.N if call == "forward" else p.K) // config.block_n
    )
    programs = data.draw(st.integers(helpers + 1, 7))
    waves = min(waves, tile_count // (programs - helpers))
    with pytest.MonkeyPatch.context() as monkeypatch:
        with_helpers(monkeypatch, helpers, waves, programs)
        kernels = on_kernels(lora_linear=config, lora_linear_backward=config)
        assert_contract(CALLS[call](p, t), kernels, p.dtype)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("order", ["backwards", "shuffled"])
def test_no_order_in_which_programs_start_is_assumed(monkeypatch, device, call, order):
    """One program at a time, each to its end: who waits for one that comes later never ends."""
    if device.type != "cpu":
        pytest.skip("the interpreter's order")
    p = Problem(150, 72, 88, 5, torch.float32, torch.float32, 0.0, "contiguous", 1)
    t = p.tensors(device)
    with_helpers(monkeypatch)
    kernels = on_kernels(
        **dict.fromkeys(("lora_linear", "lora_linear_backward"), TILES["16x16 tiles"])
    )

    def run():
        return CALLS[call](p, t)(kernels, lambda value, dtype=None: value.float())

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


@pytest.mark.parametrize("call", CALLS)
def test_the_counters_are_left_as_they_were_found(monkeypatch, device, call):
    kept = torch.zeros(4096, dtype=torch.int32, device=device)
    used = []

    def shared(x, count):
        used.append(count)
        return kept

    for module in (forward, backward):
        monkeypatch.setattr(module, "counters", shared)
    with_helpers(monkeypatch)
    p = Problem(150, 72, 88, 5, torch.float32, torch.float32, 0.0, "contiguous", 1)
    t = p.tensors(device)
    kernels = on_kernels(
        **dict.fromkeys(("lora_linear", "lora_linear_backward"), TILES["16x16 tiles"])
    )
    results = []
    for _ in range(3):
        results.append(CALLS[call](p, t)(kernels, lambda value, dtype=None: value.float()))
        assert not kept.any()
    assert used
    for again in results[1:]:
        for one, two in zip(again, results[0], strict=True):
            assert torch.equal(one, two)


def test_counters_off_cuda_are_fresh():
    x = torch.ones(1)
    counters.counters(x, 3).add_(1)
    assert not counters.counters(x, 3).any()


@pytest.mark.parametrize("call", CALLS)
def test_nan_propagates(monkeypatch, device, call):
    with_helpers(monkeypatch)
    p = Problem(40, 30, 25, 3, torch.float32, torch.float32, 0.0, "contiguous", 1)
    t = p.tensors(device)
    (t.x if call == "forward" else t.dy)[4, 5] = float("nan")
    kernels = on_kernels(
        **dict.fromkeys(("lora_linear", "lora_linear_backward"), TILES["16x16 tiles"])
    )
    lost = [found.isnan() for found in CALLS[call](p, t)(kernels, lambda v, _=None: v.float())]
    every = slice(None)
    places = {"forward": (4, 4), "backward": (4, every, 5, 5)}[call]  # y, s; dx, dA, dB, dbias
    for output, place in zip(lost, places, strict=True):
        expected = torch.zeros_like(output)
        expected[place] = True
        assert torch.equal(output, expected)
    assert_contract(CALLS[call](p, t), kernels, p.dtype)


def test_a_layer_without_helpers_is_its_operations(device):
    p = Problem(40, 30, 25, 3, torch.float32, torch.float32, 0.1, "contiguous", 1)
    t = p.tensors(device)
    x, lora_A = t.x.float(), t.lora_A.float()
    _, s = on_kernels().lora_linear(
        x, t.weight.float(), lora_A, t.lora_B.float(), 0.7, None, 0.1, t.seed
    )
    torch.testing.assert_close(s, shrink(x, lora_A, 0.1, t.seed))


CONFIG = LaunchConfig(128, 256, 64, 16, 8, 3, helpers=8)
THIN = LaunchConfig(64, 256, 128, 128, 8, 3)


@pytest.mark.parametrize(
    ("sizes", "helpers"),
    [
        ((8192, 4096, 4096, 16), True),
        ((8192, 4096, 14336, 64), True),
        ((512, 4096, 4096, 16), False),
        ((8192, 4096, 512, 16), False),
        ((8192, 4096, 4096, 80), False),  # a rank that is looped over
    ],
)
def test_helpers_work_where_they_can_pay(sizes, helpers):
    M, K, N, r = sizes
    found = forward_helpers(CONFIG, M, K, N, r, 2, 132)
    assert (found is not None) is helpers
    if found is not None:
        tiles = -(-M // 128) * -(-N // 256)
        assert found.helpers == 8
        assert found.programs == 132
        assert 0 < found.waves * (found.programs - found.helpers) <= tiles / 2 + 132


def test_a_mask_has_no_helpers():
    """It would keep them too long forward; backward the GEMM has it in its last step."""
    sizes = (8192, 4096, 4096, 16)
    options = {"sms": 132, "dtype": torch.bfloat16, "precision": "ieee", "tma": False}
    product = dataclasses.replace(CONFIG, helpers=16)
    for dropout in (False, True):
        forward_launch = lora_linear_launch(product, *sizes, dropout=dropout, **options)
        backward_launch = lora_linear_backward_launch(
            product, THIN, *sizes, dropout=dropout, **options
        )
        assert (forward_launch is None) is (backward_launch is None) is dropout


def test_the_backward_has_helpers_for_one_block_of_the_rank():
    """More would spill."""
    product = dataclasses.replace(CONFIG, helpers=16)
    assert backward_helpers(product, 8192, 4096, 4096, 16, 2, 132) is not None
    assert backward_helpers(product, 8192, 4096, 4096, 17, 2, 132) is None


@pytest.mark.parametrize("r", [1, 16, 17, 64])
def test_the_tiles_of_helpers_lie_where_those_of_the_gemm_do(r):
    launch = lora_linear_launch(
        CONFIG, 8192, 4096, 4096, r, sms=132, dtype=torch.bfloat16, precision="ieee", tma=False
    )
    assert launch.ranks >= r
    assert launch.ranks & (launch.ranks - 1) == 0
    own = launch.stages * 64 * (128 * 2 + launch.ranks * 4)
    assert launch.stages >= 2
    assert own <= (CONFIG.num_stages - 1) * 64 * (128 + 256) * 2


def test_helpers_have_the_rounds_that_cost_no_other_program_one():
    """More of them than the skinny work needs, in case memory is slower than it was taken to be."""
    product = dataclasses.replace(CONFIG, helpers=64)
    found = forward_helpers(product, 8192, 4096, 4096, 16, 2, 132)
    tiles, others = 64 * 16, 132 - 64

    def rounds(waves):
        return waves + -(-(tiles - waves * others) // 132)

    assert (found.rounds, found.alone) == (rounds(found.waves), 8)
    assert rounds(found.waves + 1) > found.rounds or 2 * (found.waves + 1) > found.alone
    fewer = forward_helpers(dataclasses.replace(CONFIG, helpers=16), 8192, 4096, 4096, 16, 2, 132)
    assert (fewer.waves, fewer.rounds) == (2, 8)


def test_zero_helpers_are_allowed():
    none = dataclasses.replace(CONFIG, helpers=0)
    assert forward_helpers(none, 8192, 4096, 4096, 16, 2, 132) is None


@pytest.mark.parametrize("call", CALLS)
def test_without_helpers_the_product_has_one_output(monkeypatch, device, call):
    """Not a second one beside it, which would be the layer's largest piece of memory."""
    p = Problem(40, 30, 25, 3, torch.float32, torch.float32, 0.0, "contiguous", 1)
    t = p.tensors(device)
    made = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(a[0]) or empty(*a, **k))
    CALLS[call](p, t)(on_kernels(), lambda value, dtype=None: value.float())
    assert made.count((p.M, p.N if call == "forward" else p.K)) == 1
