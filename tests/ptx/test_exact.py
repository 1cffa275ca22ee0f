"""The rounding that other tests are judged by, against NumPy's and PyTorch's."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from ptx.exact import BF16, E4M3, E5M2, F16, F32, F64


def numbers():
    """From below the smallest of each format to beyond its largest; ties, and what is next to them."""
    rng = np.random.default_rng(0)
    sizes = rng.standard_normal(200) * 2.0 ** rng.integers(-160, 140, 200)
    few_bits = rng.integers(-4096, 4096, 200) * 2.0 ** rng.integers(-30, 8, 200)
    ends = [0.0, 65504, 65519.99, 65520, 448, 464, 464.1, 57344, 61440, 2.0**-25, 2.0**-24 * 1.5]
    return [float(x) for x in (*sizes, *few_bits, *few_bits * (1 + 2.0**-30), *ends)]


def float32(value):
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def by_torch(dtype):
    # From float32, which holds it exactly: PyTorch rounds doubles to it first.
    return lambda value: float(torch.tensor(value, dtype=torch.float32).to(dtype))


@pytest.mark.parametrize(
    ("format", "cast", "given"),
    [
        (F32, float32, float),
        (F16, by_torch(torch.float16), float32),
        (BF16, by_torch(torch.bfloat16), float32),
        (E4M3, by_torch(torch.float8_e4m3fn), float32),
        (E5M2, by_torch(torch.float8_e5m2), float32),
    ],
    ids=["f32", "f16", "bf16", "e4m3", "e5m2"],
)
def test_to_the_nearest(format, cast, given):
    for value in map(given, numbers()):
        if np.isfinite(value) and (
            format is not E4M3 or abs(value) <= 464
        ):  # beyond is no infinity
            found = format.rounded(Fraction(value))
            np.testing.assert_equal(found, cast(value) + 0.0)  # of zeros, no fraction says which


@pytest.mark.parametrize("format", [F64, F32, F16, BF16, E5M2])
def test_the_other_ways_are_its_neighbours(format):
    for value in numbers():
        exact = Fraction(value) * Fraction(2**60 + 1, 2**60)
        down, up = format.rounded(exact, "down"), format.rounded(exact, "up")
        assert down <= exact <= up
        assert format.rounded(exact) in (down, up)
        assert format.rounded(exact, "zero") == (down if exact > 0 else up)
