"""The PTX of a bottleneck adapter's own kernels, executed, against float64."""

import pytest
import torch

pytest.importorskip("triton")

from bottlenecks import GRADIENTS, assert_right, drawn, results
from lorafast.kernels.bottleneck import bottleneck, bottleneck_backward
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.launch import INTERPRETED
from lorafast.kernels.tables import find

if INTERPRETED:
    pytest.skip("needs a process without TRITON_INTERPRET", allow_module_level=True)

from ptx.executed import executed

pytestmark = pytest.mark.executed
CPU = torch.device("cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def check(arch, M, K, N, b, dtypes, activation, *, wants=("dh", "dd"), sms=2, **configs):
    """What nobody writes is a fault. ``configs``: the backward's; ``config`` is the forward's too."""
    given = drawn(M, K, N, b, *dtypes, CPU, residual=N != K)

    def forward(**arguments):
        return bottleneck(**arguments, config=configs.get("config"))

    def backward(*arguments):
        return bottleneck_backward(*arguments, wants=wants, **configs)

    with executed(arch, seed=3, sms=sms) as state:
        found = results(given, 0.75, activation, forward, backward)
    own = [launch.kernel.__name__ for launch, *_ in state.ran]
    expected = ["bottleneck_kernel", "bottleneck_backward_kernel"]
    if {"dD", "dU", "du"} & {*wants}:
        expected.append("bottleneck_columns_kernel")
    assert own == expected
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
    config, over_columns = (
        find(name, arch, BF16, 8192, 4096, 4096, 64)
        for name in ("bottleneck", "bottleneck_backward")
    )
    case = (arch, 70, 136, 136, 48, (BF16, BF16), "gelu_tanh")
    check(*case, config=config, sms=1)
    check(*case, wants=GRADIENTS, config=config, over_columns=over_columns, sms=1)


@pytest.mark.parametrize("residual", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_whole_backward(residual):
    """Shares of dy's columns, row blocks and row groups, whose sums whoever comes last adds up."""
    K, config = 32 if residual else 144, LaunchConfig(64, 16, 16, 16, 4, 2)
    over_columns = LaunchConfig(16, 16, 16, 16, num_warps=2, num_stages=2)
    check(
        80, 150, K, 144, 16, (BF16, BF16), "relu",
        wants=GRADIENTS, config=config, over_columns=over_columns, sms=40,
    )  # fmt: skip
