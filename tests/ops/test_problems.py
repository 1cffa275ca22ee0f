"""What a call's description says of PyTorch's settings."""

import pytest
import torch

from lorafast.ops.problems import allows_tf32, expand_problem


@pytest.fixture
def matmul():
    settings = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    yield settings
    for setting, value in zip(settings, before, strict=True):
        setting.fp32_precision = value


@pytest.mark.parametrize(
    ("on_cpu", "on_gpu", "rounded"),
    [
        ("ieee", "ieee", False),
        ("bf16", "ieee", True),
        ("tf32", "ieee", True),
        ("ieee", "tf32", True),
    ],
)
def test_float32_products_may_be_rounded(matmul, on_cpu, on_gpu, rounded):
    matmul[0].fp32_precision, matmul[1].fp32_precision = on_cpu, on_gpu
    assert allows_tf32(torch.ones(1)) is rounded
    assert not allows_tf32(torch.ones(1, dtype=torch.float64))


def test_float16_is_not_rounded_as_float32_is_though_s_is_float32(matmul):
    matmul[1].fp32_precision = "tf32"
    s, lora_B = torch.ones(5, 2), torch.ones(7, 2)
    for dtype, rounded in ((torch.float32, True), (torch.float16, False)):
        assert expand_problem(s, lora_B, 0.0, None, dtype).tf32 is rounded
