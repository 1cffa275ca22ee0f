import pytest
import torch

from lorafast.reference import dropout, keep_mask, philox_4x32
from lorafast.reference.dropout import survivor_scale, threshold

# Random123's kat_vectors, "philox4x32 7": counter, key, output.
PUBLISHED = {
    "zeros": ("00000000 " * 4, "00000000 " * 2, "5f6fb709 0d893f64 4f121f81 4f730a48"),
    "ones": ("ffffffff " * 4, "ffffffff " * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
    "pi": (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "4dfccaba 190a87f0 c47362ba b6b5242a",
    ),
}


def words(text):
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "output"), PUBLISHED.values(), ids=PUBLISHED)
def test_philox_gives_the_published_vectors(counter, key, output):
    assert philox_4x32(words(counter), words(key), rounds=7) == words(output)


def test_the_mask_is_the_definition_element_by_element():
    M, K, p = 3, 11, 0.3
    seed = torch.tensor([-5_000_000_000])
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    mask = keep_mask(M, K, p, seed)
    assert mask.shape == (M, K)
    for row in range(M):
        for col in range(K):
            counter = row * 2 + col // 8
            zero = torch.tensor(0)
            call = philox_4x32((torch.tensor(counter), zero, zero, zero), key)
            word = int(call[col % 8 // 2])
            half = word >> 16 if col % 2 else word & 0xFFFF
            assert bool(mask[row, col]) == (half >= round(p * 65536))


def test_counters_beyond_32_bits_are_not_those_below():
    zero, one = torch.tensor(0), torch.tensor(1)
    key = (zero, zero)
    assert philox_4x32((zero, one, zero, zero), key) != philox_4x32((zero, zero, zero, zero), key)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_share_kept_is_the_keep_probability(p):
    kept = keep_mask(1000, 1000, p, torch.tensor([7])).double().mean().item()
    deviation = (p * (1 - p) / 1e6) ** 0.5
    assert abs(kept - 1 / survivor_scale(p)) < 5 * deviation


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5])
def test_the_scale_is_the_reciprocal_of_the_quantised_keep_probability(p):
    assert survivor_scale(p) * (65536 - threshold(p)) == pytest.approx(65536, rel=1e-15)


def test_everything_dropped_is_zero():
    x = torch.randn(4, 5)
    assert torch.equal(dropout(x, 1.0, torch.tensor([1])), torch.zeros(4, 5))


def test_no_dropout_is_the_input_itself():
    x = torch.randn(4, 5)
    assert dropout(x, 0.0, None) is x


def test_seeds_rows_and_columns_all_matter():
    one = keep_mask(64, 64, 0.5, torch.tensor([1]))
    assert not torch.equal(one, keep_mask(64, 64, 0.5, torch.tensor([2])))
    # The high half of the seed is part of the key.
    assert not torch.equal(one, keep_mask(64, 64, 0.5, torch.tensor([1 + 2**32])))
    assert len(torch.unique(one, dim=0)) == 64
    assert len(torch.unique(one, dim=1)) == 64
