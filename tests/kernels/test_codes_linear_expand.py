"""The product that reads a quantized weight as codes, against the reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from codes_products import READ, Product
from helpers import DTYPES


@given(
    kind=st.sampled_from(READ), M=st.integers(1, 70), N=st.integers(1, 140),
    K=st.integers(1, 12).map(lambda groups: 32 * groups), r=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES), transposed=st.booleans(),
)  # fmt: skip
def test_against_the_reference(poisoned, device, kind, M, N, K, r, dtype, transposed):
    Product(kind, M, N, K, r, dtype, transposed).check(device)


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("transposed", [False, True], ids=["y", "dx"])
def test_k_in_shares(poisoned, device, kind, transposed):
    """Where tiles are few; two runs give the same bits."""
    N, K = (1088, 64) if transposed else (64, 2112)
    product = Product(kind, 3, N, K, 5, torch.bfloat16, transposed)
    assert product.launch.splits > 1
    found = [product.check(device) for _ in range(2)]
    assert torch.equal(*found)
