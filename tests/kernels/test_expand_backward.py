import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from helpers import Problem, assert_contract, problems
from lorafast.kernels.common.configs import LaunchConfig
from recorded import launches_of
from small_tiles import SMALL_TILES, are_kernels, on_kernels

from lorafast import reference
from lorafast.reference import wide

NAMES = ("ds", "dB", "dbias")
SUBSETS = [asked for n in (1, 2, 3) for asked in itertools.combinations(NAMES, n)]


def call(p, t, asked):
    """What is asked for; of the kernels without what that doesn't take."""

    def run_call(run, cast):
        dy, s = p.lay_out(cast(t.dy)), cast(t.s, wide(p.dtype))
        lora_B = cast(t.lora_B, p.adapter_dtype)
        if are_kernels(run):
            found = run.expand_backward(
                dy, s if "dB" in asked else None, lora_B if {"ds", "dB"} & {*asked} else None, 0.7,
                **{name: name in asked for name in NAMES},
            )  # fmt: skip
            assert [value is not None for value in found] == [name in asked for name in NAMES]
            assert all(value is None or value.is_contiguous() for value in found)
        else:
            found = (*run.expand_backward(dy, s, lora_B, 0.7), dy.sum(0))
        return tuple(value for name, value in zip(NAMES, found, strict=True) if name in asked)

    return run_call


@given(p=problems(), tiles=st.sampled_from(list(SMALL_TILES)), asked=st.sampled_from(SUBSETS))
def test_kernel_against_reference(poisoned, device, p, tiles, asked):
    t = p.tensors(device)
    assert_contract(call(p, t, asked), on_kernels(expand_backward=SMALL_TILES[tiles]), p.dtype)


def test_ds_and_dB_are_the_default(device):
    p = Problem(20, 30, 25, 3, torch.float32, torch.float32, 0.0, "contiguous", 1)
    t = p.tensors(device)
    arguments = t.dy.float(), t.s.float(), t.lora_B.float(), 0.7
    ds, dB, dbias = on_kernels().expand_backward(*arguments)
    assert dbias is None
    for found, expected in zip((ds, dB), reference.expand_backward(*arguments), strict=True):
        torch.testing.assert_close(found, expected)


def test_dB_without_lora_B_has_the_dtype_of_dy(device):
    p = Problem(20, 30, 25, 3, torch.bfloat16, torch.bfloat16, 0.0, "contiguous", 1)
    t = p.tensors(device)
    _, dB, _ = on_kernels().expand_backward(t.dy.bfloat16(), t.s.bfloat16(), None, 0.7, ds=False)
    assert dB.dtype == torch.bfloat16
    assert dB.shape == (p.N, p.r)


def test_what_is_asked_for_needs_its_operand(device):
    dy, s = torch.ones(4, 5, device=device), torch.ones(4, 2, device=device)
    with pytest.raises(AssertionError, match="ds needs lora_B"):
        on_kernels().expand_backward(dy, s, None, 0.7)
    with pytest.raises(AssertionError, match="dB needs s"):
        on_kernels().expand_backward(dy, None, torch.ones(5, 2, device=device), 0.7)


def test_ds_alone_is_scaled_before_it_is_rounded(device):
    """One rounding: 0.7·ds of a product that bfloat16 holds, and of one that it doesn't."""
    dy = torch.tensor([[1.0, 2**-9]], device=device).bfloat16()
    lora_B = torch.tensor([[1.0], [1.0]], device=device).bfloat16()
    ds, _, _ = on_kernels().expand_backward(dy, None, lora_B, 0.7, dB=False)
    once = (0.7 * (dy.float() @ lora_B.float())).bfloat16()
    twice = (0.7 * (dy.float() @ lora_B.float()).bfloat16().float()).bfloat16()
    assert once != twice
    assert torch.equal(ds, once)


@pytest.mark.parametrize(
    ("warps", "rank", "asked", "columns"),
    [
        (8, 16, {}, 256),
        (8, 32, {}, 256),
        (8, 16, {"dbias": True}, 256),
        (8, 32, {"dbias": True}, 128),
        (16, 32, {"dbias": True}, 256),
        (8, 16, {"ds": False}, 128),
        (8, 32, {"ds": False, "dbias": True}, 128),
    ],
)
def test_tiles_are_narrower_where_registers_would_spill(warps, rank, asked, columns):
    config = LaunchConfig(64, 256, 16, rank, warps, 4)
    dy, s, lora_B = (
        torch.empty(size, device="meta") for size in ((512, 1024), (512, 16), (1024, 16))
    )

    def run():
        on_kernels().expand_backward(dy, s, lora_B, 0.7, **asked, config=config)

    assert launches_of(90, run)[0].constant("BLOCK_N") == columns
