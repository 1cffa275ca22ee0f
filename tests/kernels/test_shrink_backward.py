import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from helpers import assert_contract, problems
from small_tiles import SMALL_TILES, on_kernels

from lorafast.reference import wide


def call(p, t):
    def run_call(run, cast):
        return run.shrink_backward(
            cast(t.ds, wide(p.dtype)),
            p.lay_out(cast(t.x)),
            p.dropout_p,
            t.seed,
            cast(t.lora_A, p.adapter_dtype).dtype,
        )

    return run_call


@given(p=problems(), tiles=st.sampled_from(list(SMALL_TILES)))
def test_kernel_against_reference(poisoned, device, p, tiles):
    t = p.tensors(device)
    assert_contract(call(p, t), on_kernels(shrink_backward=SMALL_TILES[tiles]), p.dtype)
