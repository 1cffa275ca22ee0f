"""A bottleneck adapter's own kernels, compiled for every architecture: nothing spills."""

import pytest
import torch

pytest.importorskip("triton")

from lorafast.kernels.bottleneck import bottleneck, bottleneck_backward
from lorafast.kernels.common.configs import SHARED_MEMORY
from lorafast.kernels.common.launch import INTERPRETED
from lorafast.kernels.tables import table_of
from recorded import launches_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.executed,
    pytest.mark.skipif(INTERPRETED, reason="needs a process without TRITON_INTERPRET"),
]
F32, BF16 = torch.float32, torch.bfloat16
# With the widest adapters, which take the most registers and shared memory.
KINDS = {16: (BF16, F32), 32: (F32, F32)}
CASES = [
    (capability, M, b, config, *KINDS[bits])
    for capability in SHARED_MEMORY
    for bits, M, _, _, b, config in table_of(capability)["bottleneck"]
]


@pytest.mark.parametrize(
    ("capability", "M", "b", "config", "dtype", "adapter_dtype"), CASES, ids=lambda v: str(v)[:14]
)
def test_compiles_to_fast_code(machine_of, capability, M, b, config, dtype, adapter_dtype):
    """The forward with biases, and the launch over rows of a whole backward."""

    def empty(*size, dtype=adapter_dtype):
        return torch.empty(size, dtype=dtype, device="meta")

    K = 4096
    h, down, up = empty(M, K, dtype=dtype), empty(b, K), empty(K, b)
    a = empty(M, b, dtype=dtype)

    def run():
        bottleneck(h, down, up, empty(b), empty(K), 0.5, config=config)
        bottleneck_backward(h, h, a, down, up, 0.5, config=config)

    own = [x for x in launches_of(capability, run) if x.kernel.__name__.startswith("bottleneck")]
    assert len(own) == 2
    for launched in own:
        machine = machine_of(launched, capability)
        assert (machine.spills, machine.local, machine.serialized) == (0, 0, False)
        assert machine.shared <= SHARED_MEMORY[capability]
        assert any(name.endswith("MMA") for name in machine.instructions), machine.instructions
        assert "LDGSTS.128" in machine.instructions
