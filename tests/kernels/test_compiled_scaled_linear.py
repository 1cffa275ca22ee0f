"""The kernels of a frozen layer with a vector, compiled for every architecture: nothing spills."""

import pytest
import torch

pytest.importorskip("triton")

from lorafast.kernels.common.configs import SHARED_MEMORY
from lorafast.kernels.common.launch import INTERPRETED
from lorafast.kernels.scaled_linear import (
    scaled_dx,
    scaled_linear,
    scaled_linear_backward,
    scaled_pass,
)
from recorded import launches_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.executed,
    pytest.mark.skipif(INTERPRETED, reason="needs a process without TRITON_INTERPRET"),
]
F32, BF16 = torch.float32, torch.bfloat16
K = N = 4096


def empty(*size, dtype=BF16):
    return torch.empty(size, dtype=dtype, device="meta")


def calls(M, dtype):
    """Each kernel's uses by name."""
    x, weight, dy = empty(M, K, dtype=dtype), empty(N, K, dtype=dtype), empty(M, N, dtype=dtype)
    of_x, of_y, bias = empty(K, dtype=F32), empty(N, dtype=F32), empty(N, dtype=dtype)
    return {
        "y": lambda: scaled_linear(x, weight, of_y, bias),
        "y and z": lambda: scaled_linear(x, weight, of_y, bias, keeps=True),
        "x": lambda: scaled_linear(x, weight, of_x, bias, True),
        "dx, dy scaled": lambda: scaled_dx(dy, weight, of_y),
        "dx and sums": lambda: scaled_linear_backward(dy, x, weight, of_x, True),
        "pass": lambda: scaled_pass(dy, of_y, dy, F32),
    }


CASES = [(M, BF16, call) for M in (16, 512, 8192) for call in calls(M, BF16)]
CASES += [(8192, F32, call) for call in ("y and z", "x", "dx and sums")]


@pytest.mark.parametrize("capability", SHARED_MEMORY, ids="sm_{}".format)
@pytest.mark.parametrize(("M", "dtype", "call"), CASES, ids=str)
def test_compiles_to_fast_code(machine_of, capability, M, dtype, call):
    launched = launches_of(capability, calls(M, dtype)[call])[0]
    machine = machine_of(launched, capability)
    assert (machine.spills, machine.local, machine.serialized) == (0, 0, False)
    assert machine.shared <= SHARED_MEMORY[capability]
    if launched.kernel.__name__ == "scaled_linear_kernel" and dtype is BF16:
        assert any(name.endswith("MMA") for name in machine.instructions), machine.instructions
