import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from helpers import assert_contract, problems
from small_tiles import SMALL_TILES, on_kernels

from lorafast.reference import wide


def call(p, t):
    def run_call(run, cast):
        return run.expand(
            cast(t.s, wide(p.dtype)),
            p.lay_out(cast(t.lora_B, p.adapter_dtype)),
            0.7,
            p.dropout_p,
            t.seed,
            dtype=cast(t.dy).dtype,
        )

    return run_call


@given(p=problems(), tiles=st.sampled_from(list(SMALL_TILES)))
def test_kernel_against_reference(poisoned, device, p, tiles):
    t = p.tensors(device)
    assert_contract(call(p, t), on_kernels(expand=SMALL_TILES[tiles]), p.dtype)
