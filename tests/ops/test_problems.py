"""What a call's description says of PyTorch's settings."""

import pytest
import torch

from lorafast.ops.problems import allows_tf32


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
