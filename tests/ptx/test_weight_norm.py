"""The PTX of DoRA's norm, executed, against float64."""

import pytest
import torch

pytest.importorskip("triton")

from lorafast.kernels.common.launch import INTERPRETED
from lorafast.kernels.common.plan import weight_norm_launch
from lorafast.kernels.weight_norm import kernel
from norms import assert_right, drawn

if INTERPRETED:
    pytest.skip("needs a process without TRITON_INTERPRET", allow_module_level=True)

from ptx.executed import executed

pytestmark = pytest.mark.executed
CPU = torch.device("cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def check(arch, N, K, r, dtypes, sms=132, of_tensor=False):
    """What nobody writes is a fault."""
    given = drawn(N, K, r, dtypes, CPU)
    launch = weight_norm_launch(N, K, r, sms=sms)
    with executed(arch, seed=3) as state:
        norm = kernel.launcher(launch)(*given, torch.tensor(0.75) if of_tensor else 0.75)
    assert len(state.ran) == 1
    assert_right(norm, *given, 0.75)


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("dtypes", [(BF16, F32, F32), (BF16, BF16, BF16)], ids=str)
def test_on_every_architecture(dtypes, arch):
    """Rows that the compiler sees to be aligned, in more blocks of K than stages."""
    check(arch, 24, 640, 16, dtypes)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (F16, F16, F16), (F16, BF16, F32)], ids=str)
def test_odd_sizes(dtypes, arch):
    check(arch, 19, 77, 5, dtypes, of_tensor=True)


@pytest.mark.parametrize("r", [40, 70])
def test_more_rows_a_cta_and_more_ranks(r):
    check(90, 67, 96, r, (BF16, F32, F32), sms=2)
