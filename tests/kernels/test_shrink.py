import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from helpers import assert_contract, problems
from small_tiles import SMALL_TILES, on_kernels


def call(p, t):
    def run_call(run, cast):
        return run.shrink(
            p.lay_out(cast(t.x)), cast(t.lora_A, p.adapter_dtype), p.dropout_p, t.seed
        )

    return run_call


@given(p=problems(), tiles=st.sampled_from(list(SMALL_TILES)))
def test_kernel_against_reference(poisoned, device, p, tiles):
    t = p.tensors(device)
    assert_contract(call(p, t), on_kernels(shrink=SMALL_TILES[tiles]), p.dtype)
