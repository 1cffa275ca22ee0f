"""The product that reads a quantized weight as codes, against the reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from codes_products import READ, Product, weight_of
from helpers import DTYPES, skip_unless_usable
from lorafast.kernels.common.codes_plan import scales_apart
from lorafast.kernels.common.configs import LaunchConfig

from lorafast.backends.triton import Triton
from lorafast.ops.problems import linear_expand_problem


@given(
    kind=st.sampled_from(READ), M=st.integers(1, 70), N=st.integers(1, 140),
    K=st.integers(1, 12).map(lambda groups: 32 * groups), r=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES), transposed=st.booleans(), stored=st.sampled_from(DTYPES),
)  # fmt: skip
def test_against_the_reference(poisoned, device, kind, M, N, K, r, dtype, transposed, stored):
    Product(kind, M, N, K, r, dtype, transposed, stored=stored).check(device)


ROWS, ALL, BLOCKS = (1, 0), (0, 0), (128, 128)


@pytest.mark.parametrize(
    ("block", "stored", "dtype", "apart"),
    [
        (ROWS, "bfloat16", torch.bfloat16, True),
        (ALL, "float32", torch.float32, True),
        (ROWS, "float32", torch.bfloat16, True),  # rounded to bfloat16 once more
        (BLOCKS, "bfloat16", torch.bfloat16, False),
        (ROWS, "bfloat16", torch.float32, False),  # W has bfloat16's rounding, float32 tells
        (ROWS, "float16", torch.bfloat16, False),
        (ROWS, "float16", torch.float16, False),  # whose range is short
        (ALL, "float32", torch.float16, False),
    ],
)
def test_scales_of_rows_are_apart_where_the_contract_allows_it(block, stored, dtype, apart):
    assert scales_apart(block, stored, dtype) is apart


@pytest.mark.parametrize("transposed", [False, True], ids=["y", "dx"])
def test_a_configuration_that_is_asked_for_is_launched(device, transposed):
    """Where its tiles have whole groups of W's columns that share a scale; else W is made dense."""
    skip_unless_usable("triton")
    x, s, B = (torch.randn(size, device=device) for size in ((3, 96), (3, 4), (96, 4)))
    weight = weight_of("nf4", 96, 96, torch.bfloat16, device)
    p = linear_expand_problem(x, weight, s, B, None, 0.0, None, transposed)
    found = []
    for sizes, line in (((16, 32, 32), "tiles 16 × 32 × 32"), ((16, 16, 16), "dequantize")):
        plan = Triton(LaunchConfig(*sizes, 16, num_warps=1, num_stages=1)).plan(p)
        assert line in plan.launches[0]
        found.append(plan.run(x, weight, s, B, 0.5, None, 0.0, None))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", ["int8 by row", "fp8"])
@pytest.mark.parametrize("transposed", [False, True], ids=["y", "dx"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_whose_scales_are_far_from_each_other(poisoned, device, kind, transposed, dtype):
    """From 2**-20 to 2**20, and 0."""

    def edit(weight):
        exponents = torch.randint(-20, 21, weight.scale.shape, device=device)
        scale = torch.exp2(exponents.float())
        if scale.numel() > 1:
            scale[3] = 0.0
        return type(weight).build(weight.tensors() | {"scale": scale}, weight.parameters)

    product = Product(kind, 9, 72, 96, 5, dtype, transposed, stored=dtype)
    product.check(device, edit=edit)


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("transposed", [False, True], ids=["y", "dx"])
def test_k_in_shares(poisoned, device, kind, transposed):
    """Where tiles are few; two runs give the same bits."""
    N, K = (1088, 64) if transposed else (64, 2112)
    product = Product(kind, 3, N, K, 5, torch.bfloat16, transposed)
    assert product.launch.splits > 1
    found = [product.check(device) for _ in range(2)]
    assert torch.equal(*found)
