"""The PTX of the product that reads a quantized weight as codes, executed, in several schedules."""

import functools

import pytest
import torch

pytest.importorskip("triton")

from codes_products import READ, Product
from lorafast.kernels.common.launch import INTERPRETED

if INTERPRETED:
    pytest.skip("needs a process without TRITON_INTERPRET", allow_module_level=True)

from ptx.executed import executed

pytestmark = pytest.mark.executed
CPU = torch.device("cpu")


def in_schedule(arch, seed, call):
    with executed(arch, seed, resident=(1, 3, 4)[seed % 3]) as state:
        y = call()
    assert len(state.ran) == 1
    return y


def check(arch, product, seeds):
    """The contract, and the same bits in every schedule."""
    found = [product.check(CPU, functools.partial(in_schedule, arch, seed)) for seed in seeds]
    assert all(torch.equal(one, found[0]) for one in found)


def ways_of_storing():
    """Both products with every kind. Quick tests have each of them on one of the architectures."""
    for i, kind in enumerate(READ):
        for j, (product, arch) in enumerate((("y", 80), ("dx", 90), ("y", 90), ("dx", 80))):
            marks = [pytest.mark.slow] * ((i + j // 2) % 2)
            yield pytest.param(
                kind, product == "dx", arch, marks=marks, id=f"{kind}-{product}-{arch}"
            )


@pytest.mark.parametrize(("kind", "transposed", "arch"), [*ways_of_storing()])
def test_each_way_of_storing_a_weight(kind, transposed, arch):
    check(arch, Product(kind, 19, 72, 160, 5, torch.bfloat16, transposed), seeds=(0,))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("transposed", [False, True], ids=["y", "dx"])
def test_k_in_shares(transposed, arch):
    N, K = (1088, 64) if transposed else (64, 2112)
    product = Product("nf4 nested", 3, N, K, 5, torch.bfloat16, transposed, sms=8)
    assert product.launch.splits > 1
    check(arch, product, seeds=range(3))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("M", [50, 130])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_more_rows(M, dtype, arch):
    check(arch, Product("nf4", M, 72, 160, 20, dtype), seeds=(1,))


@pytest.mark.parametrize("arch", [100, 120])
@pytest.mark.parametrize("kind", ["nf4 nested", "fp8 by row"])
@pytest.mark.parametrize("M", [5, 50])
def test_for_blackwell(kind, arch, M):
    check(arch, Product(kind, M, 72, 160, 5, torch.bfloat16), seeds=(0,))


@pytest.mark.parametrize("kind", ["nf4", "int8 by row"])
def test_float32(kind):
    check(80, Product(kind, 5, 40, 64, 5, torch.float32), seeds=(0,))
