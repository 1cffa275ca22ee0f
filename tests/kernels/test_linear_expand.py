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
        return run.linear_expand(
            p.lay_out(cast(t.x)),
            p.lay_out(cast(t.weight)),
            cast(t.s, wide(p.dtype)),
            cast(t.lora_B, p.adapter_dtype),
            0.7,
            cast(t.bias) if t.bias is not None else None,
            p.dropout_p,
            t.seed,
        )

    return run_call


@given(p=problems(), tiles=st.sampled_from(list(SMALL_TILES)))
def test_kernel_against_reference(poisoned, device, p, tiles):
    t = p.tensors(device)
    assert_contract(call(p, t), on_kernels(linear_expand=SMALL_TILES[tiles]), p.dtype)


@pytest.mark.parametrize("tiles", list(SMALL_TILES))
def test_two_runs_give_the_same_bits(device, tiles):
    p = Problem(150, 130, 70, 20, torch.float32, torch.float32, 0.1, "contiguous", 1)
    t = p.tensors(device)

    def run():
        return on_kernels(linear_expand=SMALL_TILES[tiles]).linear_expand(
            t.x.float(), t.weight.float(), t.s.float(), t.lora_B.float(), 0.7
        )

    assert torch.equal(run(), run())


def test_nan_propagates(device):
    p = Problem(20, 30, 25, 3, torch.float32, torch.float32, 0.0, "contiguous", 1)
    t = p.tensors(device)
    t.x[4, 5] = float("nan")
    result = on_kernels(linear_expand=None).linear_expand(
        t.x.float(), t.weight.float(), t.s.float(), t.lora_B.float(), 0.7
    )
    assert result.isnan().any()
    assert not result.isnan().all()
