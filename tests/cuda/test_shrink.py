"""``shrink`` of csrc/cuda: executed from nvcc's PTX by the plans of its family."""

import pytest
import torch
from on_machine import launched, needs_nvcc
from skinny_cases import (
    BF16,
    F16,
    F32,
    KINDS,
    LAYOUTS,
    SCHEDULES,
    SEED,
    Case,
    bits,
    check,
    dtype_on,
    executed,
    specials,
)

from lorafast.reference import keep_mask

pytestmark = needs_nvcc


def case(*sizes, **more):
    return Case("shrink", *sizes, **more)


@pytest.mark.parametrize("arch", [75, 80, pytest.param(90, marks=pytest.mark.slow)])
@pytest.mark.parametrize("r", [1, 3, 16, 17, 64, 256])
def test_ranks(r, arch):
    check(case(130, 200, r, dtype=dtype_on(arch), arch=arch))


@pytest.mark.parametrize(("arch", "dtype"), KINDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 1, 1), (77, 131, 5), (70, 264, 20), (65, 72, 64)])
def test_dtypes(sizes, dropout_p, dtype, arch):
    check(case(*sizes, dtype=dtype, dropout_p=dropout_p, arch=arch))


@pytest.mark.parametrize(("arch", "dtype"), KINDS)
@pytest.mark.parametrize("adapter", [BF16, F16, F32])
def test_adapters_of_another_dtype(dtype, adapter, arch):
    check(case(40, 136, 12, dtype=dtype, adapter=adapter, arch=arch))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("arch", "dtype"), [(80, BF16), (80, F32), (75, F16)])
def test_layouts(layout, dtype, arch):
    check(case(70, 136, 16, dtype=dtype, lay_out=LAYOUTS[layout], dropout_p=0.3, arch=arch))


@pytest.mark.parametrize(("arch", "dtype"), KINDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_infinity_and_nan(dtype, dropout_p, arch):
    check(case(40, 136, 12, dtype=dtype, dropout_p=dropout_p, lay_out=specials, arch=arch))


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [*KINDS, *(pytest.param(90, dtype, marks=pytest.mark.slow) for dtype in (BF16, F16, F32))],
)
def test_the_mask_is_everyones(dtype, arch):
    """A picks r columns of x, all ones: s is not 0 where they are kept."""
    one = case(70, 77, 16, dtype=dtype, arch=arch, dropout_p=0.3)
    keep = keep_mask(70, 77, 0.3, SEED)
    for first in (0, 16, 61):
        factor = torch.zeros(16, 77, dtype=dtype)
        factor[:, first : first + 16] = torch.eye(16)
        given = one.tensors() | {"large": torch.ones(70, 77, dtype=dtype), "factor": factor}
        with launched(arch, sms=one.sms):
            s = one.run(given)["s"]
        assert (s != 0).equal(keep[:, first : first + 16])


@pytest.mark.slow
@pytest.mark.parametrize("arch", [86, 100, 120])
def test_other_architectures(arch):
    check(case(130, 264, 40, arch=arch))


@pytest.mark.parametrize(("arch", "dtype"), KINDS)
def test_nothing_to_sum(dtype, arch):
    found, run = executed(case(5, 0, 3, dtype=dtype, arch=arch))
    assert not found["s"].any()
    assert len(run.launches) == 1


def test_no_rows():
    found, run = executed(case(0, 64, 3))
    assert found["s"].shape == (0, 3)
    assert not run.launches


@pytest.mark.parametrize("arch", [75, 80, pytest.param(90, marks=pytest.mark.slow)])
def test_bits_are_those_of_every_schedule(arch):
    """Also of two calls in a row, on the same counters, with fewer CTAs resident than there are."""
    one = case(140, 900, 16, dtype=dtype_on(arch), arch=arch, dropout_p=0.2)
    first, *others = (executed(one, *schedule, times=2)[0]["s"] for schedule in SCHEDULES)
    assert all(bits(first).equal(bits(other)) for other in others)
