"""The PTX of a bottleneck adapter's own kernels, executed, against float64."""

import pytest
import torch

pytest.importorskip("triton")

from bottlenecks import GRADIENTS, assert_right, drawn, results
from lorafast.kernels.bottleneck import bottleneck, bottleneck_backward
from lorafast.kernels.common.launch import INTERPRETED
from lorafast.kernels.tables import find

if INTERPRETED:
    pytest.skip("needs a process without TRITON_INTERPRET", allow_module_level=True)

from ptx.executed import executed

pytestmark = pytest.mark.executed
CPU = torch.device("cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def check(arch, M, K, N, b, dtypes, activation, *, wants=("dh", "dd"), config=None, sms=2):
    """What nobody writes is a fault. Without dD, dU and du the kernels are this operation's own."""
    given = drawn(M, K, N, b, *dtypes, CPU, residual=N != K)

    def forward(**arguments):
        return bottleneck(**arguments, config=config)

    def backward(*arguments):
        return bottleneck_backward(*arguments, wants=wants, config=config)

    with executed(arch, seed=3, sms=sms) as state:
        found = results(given, 0.75, activation, forward, backward)
    own = [launch.kernel.__name__ for launch, *_ in state.ran]
    assert own[:2] == ["bottleneck_kernel", "bottleneck_backward_kernel"]
    assert len(own) == 2 + bool({"dU", "du"} & {*wants}) + ("dD" in wants)
    assert_right(found, given, 0.75, activation)


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_rows_that_the_compiler_sees_to_be_aligned(arch):
    """In two column groups, the last of them smaller."""
    check(arch, 20, 160, 160, 16, (BF16, F32), "gelu", sms=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtypes", "activation"), [((F16, F32), "silu"), ((F32, F32), "tanh")], ids=str
)
def test_odd_sizes(dtypes, activation):
    check(80, 19, 45, 37, 5, dtypes, activation)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 100])
def test_the_tiles_of_many_rows(arch):
    """Where ``wgmma`` or ``tcgen05`` multiplies."""
    config = find("bottleneck", arch, BF16, 8192, 4096, 4096, 64)
    check(arch, 70, 136, 136, 48, (BF16, BF16), "gelu_tanh", config=config, sms=1)


@pytest.mark.slow
def test_a_whole_backward():
    check(80, 20, 48, 48, 16, (BF16, BF16), "relu", wants=GRADIENTS)
