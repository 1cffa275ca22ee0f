"""The PTX of a layer of few rows in one launch, executed, in several schedules."""

import functools

import pytest
import torch

pytest.importorskip("triton")

from decodings import DENSE, Decoding
from lorafast.kernels.common.launch import INTERPRETED

if INTERPRETED:
    pytest.skip("needs a process without TRITON_INTERPRET", allow_module_level=True)

from ptx.executed import executed

pytestmark = pytest.mark.executed
CPU = torch.device("cpu")


def in_schedule(arch, seed, call):
    with executed(arch, seed, resident=(1, 3, 4)[seed % 3]) as state:
        found = call()
    assert len(state.ran) == 1
    return found


def check(arch, decoding, seeds):
    """The contract, and the same bits in every schedule."""
    found = [decoding.check(CPU, functools.partial(in_schedule, arch, seed)) for seed in seeds]
    for others in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(others, found[0], strict=True))


@pytest.mark.parametrize(
    ("kind", "arch"), [(DENSE, 90), ("nf4 nested", 80), ("int8 by row", 90), ("fp8", 80)]
)
def test_each_tile_makes_its_own_s(kind, arch):
    """How a tile of codes is read ``test_codes_linear_expand`` executes in every format."""
    decoding = Decoding(kind, 11, 40, 96, 5, torch.bfloat16)
    assert decoding.launch.shares == 0
    check(arch, decoding, seeds=(0,))


@pytest.mark.parametrize(
    ("kind", "arch", "K"), [(DENSE, 80, 2080), ("nf4 nested", 90, 1088)], ids=str
)
def test_helpers(kind, arch, K):
    """Two blocks of the rank; K in shares. In some schedules tiles are early, and make s themselves."""
    decoding = Decoding(kind, 3, 40, K, 20, torch.bfloat16, sms=8)
    assert decoding.launch.shares >= 4
    assert decoding.launch.splits == 2
    check(arch, decoding, seeds=range(3))


@pytest.mark.parametrize("arch", [100, 120])
def test_for_blackwell(arch):
    check(arch, Decoding("fp8 by row", 16, 40, 1056, 5, torch.float16), seeds=(1,))


def test_float32():
    check(80, Decoding("int8 by row", 5, 40, 64, 5, torch.float32), seeds=(0,))
