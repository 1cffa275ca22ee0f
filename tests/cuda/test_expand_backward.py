"""``expand_backward`` of csrc/cuda: executed from nvcc's PTX by the plans of its family."""

import itertools

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
    Case,
    bits,
    check,
    dtype_on,
    executed,
    specials,
)

from lorafast.backends.cost import Device
from lorafast.backends.cuda.launch import Launch
from lorafast.backends.cuda.skinny import plan_expand_backward
from lorafast.core.problem import Problem

pytestmark = needs_nvcc
OUTPUTS = ("ds", "dB", "dbias")
SUBSETS = [wants for n in (1, 2, 3) for wants in itertools.combinations(OUTPUTS, n)]


def case(*sizes, **more):
    return Case("expand_backward", *sizes, **more)


@pytest.mark.parametrize("arch", [80, *(pytest.param(n, marks=pytest.mark.slow) for n in (75, 90))])
@pytest.mark.parametrize("r", [1, 3, 16, 17, 64, 256])
def test_ranks(r, arch):
    check(case(140, 270, r, dtype=dtype_on(arch), arch=arch))


@pytest.mark.parametrize(("arch", "dtype"), KINDS)
@pytest.mark.parametrize("wants", SUBSETS, ids="+".join)
def test_subsets(wants, dtype, arch):
    found = check(case(70, 264, 20, dtype=dtype, wants=wants, arch=arch))
    assert tuple(found) == wants


@pytest.mark.parametrize(("arch", "dtype"), KINDS)
@pytest.mark.parametrize(
    "sizes", [(1, 8, 1), (1, 1, 1), (131, 77, 5), (264, 70, 20), (72, 513, 64)]
)
def test_dtypes(sizes, dtype, arch):
    check(case(*sizes, dtype=dtype, arch=arch))


@pytest.mark.parametrize(("arch", "dtype"), KINDS)
@pytest.mark.parametrize("adapter", [BF16, F16, F32])
def test_adapters_of_another_dtype(dtype, adapter, arch):
    check(case(136, 40, 12, dtype=dtype, adapter=adapter, arch=arch))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("arch", "dtype"), [(80, BF16), (80, F32), pytest.param(75, F16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("wants", [OUTPUTS, ("ds",)], ids="+".join)
def test_layouts(layout, dtype, wants, arch):
    check(case(70, 136, 16, dtype=dtype, lay_out=LAYOUTS[layout], wants=wants, arch=arch))


@pytest.mark.parametrize(("arch", "dtype"), KINDS)
def test_infinity_and_nan(dtype, arch):
    check(case(40, 136, 12, dtype=dtype, lay_out=specials, arch=arch))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [86, 100, 120])
def test_other_architectures(arch):
    check(case(130, 264, 40, arch=arch))


@pytest.mark.parametrize("arch", [86, pytest.param(120, marks=pytest.mark.slow)])
def test_a_tile_that_would_fill_shared_memory(arch):
    """Of 64 ranks of float16 it has all that a CTA may have, and the kernel has 16 bytes of its own."""
    check(case(40, 140, 64, dtype=F16, arch=arch))


@pytest.mark.parametrize(("arch", "dtype"), KINDS)
@pytest.mark.parametrize("wants", SUBSETS, ids="+".join)
def test_nothing_to_sum(wants, dtype, arch):
    """Without rows dB and dbias are 0, without columns ds is."""
    for columns in (40, 600):
        found, _ = executed(case(0, columns, 3, dtype=dtype, wants=wants, arch=arch))
        assert not any(tensor.any() for tensor in found.values())
    found, _ = executed(case(5, 0, 3, dtype=dtype, wants=wants, arch=arch))
    assert not any(tensor.any() for tensor in found.values())


def test_dbias_alone_needs_neither_s_nor_b():
    """As the registered operation asks for it, which then knows no rank."""
    dy, device = torch.randn(70, 40), Device.known_by("a device", 90, 8)
    problem = Problem("expand_backward", 70, 0, 40, 0, F32, F32, dy.device, wants=("dbias",))
    launch = plan_expand_backward(problem, device)
    assert isinstance(launch, Launch), launch
    with launched(90):
        ds, dB, dbias = launch.run(dy, None, None, 1.0)
    assert ds is dB is None
    torch.testing.assert_close(dbias, dy.sum(0))


@pytest.mark.parametrize("arch", [80, *(pytest.param(n, marks=pytest.mark.slow) for n in (75, 90))])
def test_bits_are_those_of_every_schedule(arch):
    """Also of two calls in a row, on the same counters, with fewer CTAs resident than there are."""
    one = case(400, 530, 16, dtype=dtype_on(arch), arch=arch)
    first, *others = (executed(one, *schedule, times=2)[0] for schedule in SCHEDULES)
    for name in OUTPUTS:
        assert all(bits(first[name]).equal(bits(other[name])) for other in others), name
