"""The PTX of a frozen layer with a vector, executed, against float64."""

import functools

import pytest
import torch

pytest.importorskip("triton")

from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.launch import INTERPRETED
from lorafast.kernels.scaled_linear import scaled_linear, scaled_linear_backward, scaled_pass
from scaled_layers import assert_right, drawn, results

if INTERPRETED:
    pytest.skip("needs a process without TRITON_INTERPRET", allow_module_level=True)

from ptx.executed import executed

pytestmark = pytest.mark.executed
CPU = torch.device("cpu")
F32, BF16 = torch.float32, torch.bfloat16
POINTERS = LaunchConfig(32, 32, 32, 16, num_warps=1, num_stages=2)
TMA = LaunchConfig(64, 32, 32, 16, 4, 2, descriptors=True, parts=2, masked_parts=2)


def check(arch, config, size, dtype, scales_input, sms=132):
    """Forward and backward; what nobody writes is a fault."""
    given = drawn(*size, dtype, F32, CPU, scales_input=scales_input)
    forward = functools.partial(scaled_linear, keeps=not scales_input, config=config)
    backward = functools.partial(scaled_linear_backward, config=config)
    with executed(arch, sms=sms, seed=3) as state:
        found = results(given, scales_input, forward, backward)
    assert len(state.ran) == (3 if scales_input else 4)
    assert_right(found, given, scales_input)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("scales_input", [False, True], ids=["y", "x"])
def test_on_each_way_to_multiply(arch, scales_input):
    """Rows that TMA reads, a tail in every dimension."""
    check(arch, TMA if arch >= 90 else POINTERS, (72, 80, 48), BF16, scales_input)


@pytest.mark.parametrize("scales_input", [False, True], ids=["y", "x"])
def test_odd_sizes_in_float32(scales_input):
    check(80, POINTERS, (19, 45, 37), F32, scales_input)


def test_the_pass_with_both_results():
    """As it is launched beside PyTorch's GEMM: several row groups."""
    g, t, scale = torch.randn(80, 70).to(BF16), torch.randn(80, 70).to(BF16), torch.randn(70)
    with executed(90, seed=3):
        out, sums = scaled_pass(g, scale, t, F32)
    assert torch.equal(out, (g.double() * scale.double()).float().to(BF16))
    exact = g.double() * t.double()
    assert ((sums - exact.sum(0)).abs() <= 80 * 2**-24 * exact.abs().sum(0)).all()
