"""A bottleneck adapter's own kernels, compiled for every architecture: nothing spills."""

import pytest
import torch

pytest.importorskip("triton")

from lorafast.kernels.bottleneck import bottleneck, bottleneck_backward
from lorafast.kernels.common.bottleneck_plan import GRADIENTS
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
OVER_COLUMNS = [
    (capability, b, config, *KINDS[bits])
    for capability in SHARED_MEMORY
    for bits, _, _, _, b, config in table_of(capability)["bottleneck_backward"]
]
K = 4096


def assert_fast(machine, capability):
    assert (machine.spills, machine.local, machine.serialized) == (0, 0, False)
    assert machine.shared <= SHARED_MEMORY[capability]
    assert any(name.endswith("MMA") for name in machine.instructions), machine.instructions
    assert "LDGSTS.128" in machine.instructions


def drawn(M, b, dtype, adapter_dtype):
    """``h``, which is dy too, ``a``, ``down`` and ``up``, without memory."""
    of = {"h": (M, K), "a": (M, b), "down": (b, K), "up": (K, b)}
    return tuple(
        torch.empty(size, dtype=dtype if name in ("h", "a") else adapter_dtype, device="meta")
        for name, size in of.items()
    )


@pytest.mark.parametrize(
    ("capability", "M", "b", "config", "dtype", "adapter_dtype"), CASES, ids=lambda v: str(v)[:14]
)
def test_compiles_to_fast_code(machine_of, capability, M, b, config, dtype, adapter_dtype):
    """The forward with biases, and the launch over rows, of a whole backward and of one that has nothing
    to sum but da."""
    h, a, down, up = drawn(M, b, dtype, adapter_dtype)
    d, u = down.new_empty(b), up.new_empty(K)

    def run():
        bottleneck(h, down, up, d, u, 0.5, config=config)
        for wants in (GRADIENTS, ("dh", "dd")):
            bottleneck_backward(h, h, a, down, up, 0.5, wants=wants, config=config)

    own = [x for x in launches_of(capability, run) if "columns" not in x.kernel.__name__]
    assert len(own) == 3
    for launched in own:
        assert_fast(machine_of(launched, capability), capability)


@pytest.mark.parametrize("wants", [GRADIENTS, ("dD", "dd", "dU", "du")], ids=["dh", "no dh"])
@pytest.mark.parametrize(
    ("capability", "b", "config", "dtype", "adapter_dtype"), OVER_COLUMNS, ids=lambda v: str(v)[:14]
)
def test_sums_over_rows_compile_to_fast_code(
    machine_of, capability, b, config, dtype, adapter_dtype, wants
):
    """With dh beside those of dy, or without."""
    h, a, down, up = drawn(8192, b, dtype, adapter_dtype)

    def run():
        bottleneck_backward(h, h, a, down, up, 0.5, wants=wants, over_columns=config)

    launched = launches_of(capability, run)[-1]
    assert launched.kernel.__name__ == "bottleneck_columns_kernel"
    assert_fast(machine_of(launched, capability), capability)
