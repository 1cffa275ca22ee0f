"""A frozen layer with a vector on the device: both ways to compute it, and what ``auto`` does."""

import functools

import pytest
import torch
from helpers import skip_unless_usable
from lorafast.kernels.scaled_linear import scaled_linear, scaled_linear_backward, scaled_pass
from scaled_layers import assert_right, drawn, results

import lorafast
from lorafast import ops

pytestmark = pytest.mark.gpu
sides = pytest.mark.parametrize("scales_input", [False, True], ids=["y", "x"])
SIZES = [(8192, 4096, 1024), (2049, 1537, 769), (512, 4096, 4096), (16, 4096, 4096), (1, 1, 1)]


@pytest.fixture(autouse=True)
def _usable():
    skip_unless_usable("triton")


@sides
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernels_against_the_reference(size, dtype, scales_input, device):
    given = drawn(*size, dtype, torch.float32, device, scales_input=scales_input)
    forward = functools.partial(scaled_linear, keeps=not scales_input)
    found = results(given, scales_input, forward, scaled_linear_backward)
    assert_right(found, given, scales_input)


@sides
@pytest.mark.parametrize("backend", ["auto", "triton", "aten"])
def test_a_layer(backend, scales_input, device):
    given = drawn(
        4096, 2048, 2048, torch.bfloat16, torch.float32, device, scales_input=scales_input
    )
    dy = given.pop("dy")
    leaves = [given[name].requires_grad_() for name in ("x", "scale")]
    with lorafast.use_backend(backend):
        y = ops.scaled_linear(**given, scales_input=scales_input)
    dx, dscale = torch.autograd.grad(y, leaves, dy)
    found = {"y": y.detach(), "z": None, "dx": dx, "dscale": dscale}
    plain = {name: t.detach() for name, t in given.items()} | {"dy": dy}
    assert_right(found, plain, scales_input)


def test_the_pass_gives_the_same_bits_twice(device):
    g, t = (torch.randn(5000, 3000, device=device, dtype=torch.bfloat16) for _ in "gt")
    scale = torch.randn(3000, device=device)
    first, second = (scaled_pass(g, scale, t, torch.float32) for _ in range(2))
    assert all(map(torch.equal, first, second))
