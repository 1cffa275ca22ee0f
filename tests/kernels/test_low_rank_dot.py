"""A float32 factor as the sum of two numbers that TF32 holds, so that float16 times it loses nothing."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from lorafast.kernels.common.device import _split


@triton.jit
def split_kernel(x_ptr, high_ptr, low_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    high, low = _split(tl.load(x_ptr + offsets))
    tl.store(high_ptr + offsets, high)
    tl.store(low_ptr + offsets, low)


def split(x):
    high, low = torch.empty_like(x), torch.empty_like(x)
    split_kernel[(1,)](x, high, low, BLOCK=x.numel())
    return high, low


def test_the_parts_are_the_whole(device):
    x = torch.randn(1024, device=device) * 10.0 ** torch.arange(-32, 32, device=device).repeat(16)
    high, low = split(x)
    assert not (high.view(torch.int32) & 0x1FFF).any()  # 10 bits behind the leading one
    assert torch.equal(high + low, x)
    assert (low.abs() < 2.0**-10 * x.abs()).all()


def test_infinity_stays_and_nan_propagates(device):
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0], device=device)
    high, low = split(x)
    torch.testing.assert_close(high + low, x, rtol=0, atol=0, equal_nan=True)
    assert low[:2].eq(0).all()
