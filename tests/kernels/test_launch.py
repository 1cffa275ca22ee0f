import pytest
import torch

pytest.importorskip("triton")

from lorafast.kernels.common import launch
from lorafast.kernels.common.configs import chunks
from lorafast.kernels.common.launch import precision, sms


@pytest.fixture
def matmul():
    before = torch.backends.cuda.matmul.fp32_precision
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision = before


def test_float32_is_rounded_as_pytorch_does(matmul):
    x = torch.randn(2, 2)
    matmul.fp32_precision = "ieee"
    assert precision(x) == "ieee"
    matmul.fp32_precision = "tf32"
    assert precision(x) == "tf32"
    assert precision(x.bfloat16()) == "ieee"


def test_beside_float16_float32_is_rounded_to_its_significand_always(matmul):
    x = torch.randn(2, 2).half()
    for chosen in ("ieee", "tf32"):
        matmul.fp32_precision = chosen
        assert precision(x) == "tf32"


@pytest.mark.parametrize("length", [1, 15, 16, 17, 1000, 8192])
@pytest.mark.parametrize("programs", [1, 3, 100])
def test_chunks_cover_the_length_once(length, programs):
    block = 16
    count, blocks = chunks(4, length, block, programs)
    covered = [min((i + 1) * blocks * block, length) - i * blocks * block for i in range(count)]
    assert sum(covered) == length
    assert min(covered) > 0


def test_launches_leave_the_sms_free_that_pytorch_is_asked_to(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETER_SMS", 132)
    x = torch.ones(1)
    assert sms(x) == 132
    monkeypatch.setattr(torch._C, "_get_sm_carveout_experimental", lambda: 16, raising=False)
    assert sms(x) == 116
