"""The PTX that makes quantized weights dense, executed: to the bit what their ``rows`` are."""

import pytest
import torch

pytest.importorskip("triton")

from lorafast.kernels.common.launch import INTERPRETED
from lorafast.kernels.dequantize import dequantize
from quantized_weights import KINDS, draw, same

if INTERPRETED:
    pytest.skip("needs a process without TRITON_INTERPRET", allow_module_level=True)

from ptx.executed import executed

pytestmark = pytest.mark.executed
CPU = torch.device("cpu")
BLACKWELL = (100, 120)


def check(kind, arch, N, K, stored, dtype):
    """What nobody writes is a fault."""
    weight = draw(kind, N, K, stored, CPU).to(dtype)
    with executed(arch, seed=3) as state:
        W = torch.empty(*weight.shape, dtype=dtype)
        dequantize(weight, W)
    assert len(state.ran) == 1
    same(W, weight.dense())


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_each_way_of_storing_a_weight(kind, dtype, arch):
    """Rows that the compiler sees to be aligned."""
    check(kind, arch, 36, 160, torch.bfloat16, dtype)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kind", KINDS)
def test_odd_sizes(kind, arch):
    """A last byte that is half used, a short last block, NaN among e4m3, 127 times the scale."""
    check(kind, arch, 33, 101, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("arch", BLACKWELL)
@pytest.mark.parametrize("kind", KINDS)
def test_for_blackwell(kind, arch):
    check(kind, arch, 36, 160, torch.bfloat16, torch.bfloat16)
