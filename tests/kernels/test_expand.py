import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from helpers import assert_contract, problems
from small_tiles import SMALL_TILES, on_kernels

from lorafast.reference import keep_mask, wide


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


@pytest.mark.parametrize("tiles", SMALL_TILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_the_mask_is_the_references_bit_for_bit(device, tiles, dtype, bias):
    M, N = 37, 91
    kernels = on_kernels(expand=SMALL_TILES[tiles])
    for number in (0, -1, 2**62 + 12345):
        seed = torch.tensor([number], device=device)
        y = kernels.expand(
            torch.ones(M, 2, dtype=dtype, device=device),
            torch.ones(N, 2, dtype=dtype, device=device),
            1.0, 0.3, seed, dtype=dtype,
            bias=torch.zeros(N, dtype=dtype, device=device) if bias else None,
        )  # fmt: skip
        assert torch.equal(y != 0, keep_mask(M, N, 0.3, seed))
