import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from helpers import Problem, assert_contract, problems
from small_tiles import SMALL_TILES, on_kernels

from lorafast.reference import wide


def call(p, t):
    def run_call(run, cast):
        return run.expand_backward(
            p.lay_out(cast(t.dy)), cast(t.s, wide(p.dtype)), cast(t.lora_B, p.adapter_dtype), 0.7
        )

    return run_call


@given(p=problems(), tiles=st.sampled_from(list(SMALL_TILES)))
def test_kernel_against_reference(poisoned, device, p, tiles):
    t = p.tensors(device)
    assert_contract(call(p, t), on_kernels(expand_backward=SMALL_TILES[tiles]), p.dtype)


@pytest.mark.parametrize("tiles", list(SMALL_TILES))
def test_two_runs_give_the_same_bits(device, tiles):
    p = Problem(150, 130, 70, 20, torch.float32, torch.float32, 0.1, "contiguous", 1)
    t = p.tensors(device)

    def run():
        return on_kernels(expand_backward=SMALL_TILES[tiles]).expand_backward(
            t.dy.float(), t.s.float(), t.lora_B.float(), 0.7
        )[1]

    assert torch.equal(run(), run())


def test_nan_propagates(device):
    p = Problem(20, 30, 25, 3, torch.float32, torch.float32, 0.0, "contiguous", 1)
    t = p.tensors(device)
    t.dy[4, 5] = float("nan")
    result = on_kernels(expand_backward=None).expand_backward(
        t.dy.float(), t.s.float(), t.lora_B.float(), 0.7
    )[1]
    assert result.isnan().any()
    assert not result.isnan().all()
