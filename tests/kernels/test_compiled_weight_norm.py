"""DoRA's norm, compiled for every architecture: nothing spills, W comes ahead of its use."""

import pytest
import torch

pytest.importorskip("triton")

from lorafast.kernels.common.configs import SHARED_MEMORY
from lorafast.kernels.common.launch import INTERPRETED
from lorafast.kernels.common.plan import weight_norm_launch
from lorafast.kernels.weight_norm import kernel
from recorded import launches_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.executed,
    pytest.mark.skipif(INTERPRETED, reason="needs a process without TRITON_INTERPRET"),
]
F32, BF16 = torch.float32, torch.bfloat16


def empty(*size, dtype):
    return torch.empty(size, dtype=dtype, device="meta")


@pytest.mark.parametrize("capability", SHARED_MEMORY, ids="sm_{}".format)
@pytest.mark.parametrize("N", [1024, 8192])
@pytest.mark.parametrize(
    ("dtypes", "r"),
    [
        ((BF16, F32, F32), 16),
        ((BF16, F32, F32), 64),
        ((BF16, F32, F32), 256),
        ((BF16, BF16, BF16), 16),
        ((F32, F32, F32), 32),
    ],
    ids=str,
)
def test_compiles_to_fast_code(machine_of, dtypes, r, N, capability):
    machine, launch = compiled(machine_of, capability, dtypes, N, 4096, r)
    assert "HMMA" in machine.instructions
    assert ("LDGSTS.128" in machine.instructions) is (launch.rank_blocks <= 2)


@pytest.mark.parametrize("capability", [80, 86, 90], ids="sm_{}".format)
@pytest.mark.parametrize(
    ("dtypes", "r"), [((BF16, F32, F32), 64), ((F32, F32, F32), 17), ((F32, F32, F32), 65)], ids=str
)
def test_of_rows_that_are_not_aligned(machine_of, dtypes, r, capability):
    """Loads are one element wide, and their addresses take registers."""
    compiled(machine_of, capability, dtypes, 8192, 4100, r)


def compiled(machine_of, capability, dtypes, N, K, r):
    """Without spills, within shared memory."""
    sizes = ((N, K), (r, K), (N, r))
    given = [empty(*size, dtype=dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
    launch = weight_norm_launch(N, K, r, sms=132)
    (launched,) = launches_of(capability, lambda: kernel.launcher(launch)(*given, 0.5))
    machine = machine_of(launched, capability)
    assert (machine.spills, machine.local) == (0, 0)
    assert machine.shared <= SHARED_MEMORY[capability]
    return machine, launch
