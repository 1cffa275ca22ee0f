import pytest
import torch

from lorafast import reference
from lorafast.backends import dropout


@pytest.mark.parametrize("p", [1e-9, 0.05, 0.5, 1.0])
@pytest.mark.parametrize(("M", "K"), [(0, 5), (1, 1), (3, 7), (5, 8), (37, 150), (2, 4099)])
@pytest.mark.parametrize("seed", [0, -1, 2**62 + 12345])
def test_the_mask_is_that_of_the_reference_bit_for_bit(M, K, p, seed):
    seed = torch.tensor([seed])
    assert torch.equal(dropout.keep_mask(M, K, p, seed), reference.keep_mask(M, K, p, seed))


@pytest.mark.parametrize("index", [0, 2**32 - 1, 2**32, 2**40 + 7])
def test_counters_of_more_than_32_bits(index):
    low = 0xFFFFFFFF
    seed, zero = torch.tensor(-(2**35) + 3), torch.tensor(0)
    found = dropout._philox(torch.tensor([index]), seed)
    counter = (torch.tensor(index & low), torch.tensor(index >> 32), zero, zero)
    expected = reference.philox_4x32(counter, (seed & low, (seed >> 32) & low))
    assert tuple(map(int, found)) == tuple(map(int, expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dropout_is_that_of_the_reference_bit_for_bit(dtype):
    x, seed = torch.randn(9, 21).to(dtype), torch.tensor([5])
    assert torch.equal(dropout.dropout(x, 0.3, seed), reference.dropout(x, 0.3, seed))


def test_no_dropout_is_the_input_itself():
    x = torch.randn(3, 4)
    assert dropout.dropout(x, 0.0, None) is x
