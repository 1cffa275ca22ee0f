"""DoRA's norm on the device, in one launch."""

import pytest
import torch
from helpers import skip_unless_usable
from lorafast.kernels.weight_norm import weight_norm
from norms import assert_right, drawn

import lorafast
from lorafast import ops

pytestmark = pytest.mark.gpu

SIZES = [
    (4096, 4096, 16),
    (14336, 4096, 64),
    (1024, 4096, 8),
    (2049, 1537, 5),
    (576, 576, 130),
    (1, 1, 1),
]


@pytest.fixture(autouse=True)
def _usable():
    skip_unless_usable("triton")


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_the_reference(size, dtype, adapter, device):
    given = drawn(*size, (dtype, adapter, adapter), device)
    assert_right(weight_norm(*given, 0.7), *given, 0.7)


def test_it_is_one_launch_that_the_host_does_not_wait_for(device):
    given = drawn(1024, 2048, 16, (torch.bfloat16, torch.float32, torch.float32), device)
    scaling = torch.tensor(0.75, device=device)
    expected = ops.weight_norm(*given, scaling)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
            found = ops.weight_norm(*given, scaling)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.equal(found, expected)
    assert_right(found, *given, 0.75)
    kernels = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert [event.name for event in kernels] == ["weight_norm_kernel"]


def test_a_quantized_weights(device):
    weight, lora_A, lora_B = drawn(777, 1536, 16, (torch.bfloat16,) * 3, device)
    for base in ("nf4", "int8", "fp8"):
        stored = lorafast.operands.quantize(weight, base)
        found = ops.weight_norm(stored, lora_A, lora_B, 0.7)
        assert_right(found, stored.dense(), lora_A, lora_B, 0.7)
