"""The factored norm of DoRA against the one that makes ``W + scaling · B·A``."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy_formats import FORMATS, held

from lorafast import ops, reference
from lorafast.core.dtypes import LEAST_NORM

pytestmark = pytest.mark.usefixtures("toy_formats")
K, N = 24, 40


class Counted(TorchDispatchMode):
    products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


def eps(dtype):
    return torch.finfo(dtype).eps


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_of_every_row(format, dtype, adapter_dtype):
    weight = torch.randn(N, K).to(dtype)
    lora_A, lora_B = torch.randn(5, K).to(adapter_dtype), torch.randn(N, 5).to(adapter_dtype)
    found = ops.weight_norm(FORMATS[format](weight), lora_A, lora_B, 0.7)
    exact = reference.weight_norm(
        held(format, weight).double(), lora_A.double(), lora_B.double(), 0.7
    )
    assert found.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert (found - exact).norm() <= 2 * eps(dtype) * exact.norm()


@pytest.mark.parametrize("rows", [0, 1, 7, 16, 17, 100])
def test_any_number_of_rows(rows):
    """Half precision is read in blocks of them."""
    weight, lora_A = torch.randn(rows, K).bfloat16(), torch.randn(2, K)
    lora_B = torch.randn(rows, 2)
    found = ops.weight_norm(weight, lora_A, lora_B, 2.0)
    exact = reference.weight_norm(weight.double(), lora_A.double(), lora_B.double(), 2.0)
    assert found.shape == (rows,)
    assert (found - exact).norm() <= 2 * eps(torch.float32) * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_row_of_zeros_can_be_divided_by(dtype):
    weight, lora_A, lora_B = torch.randn(3, K).to(dtype), torch.randn(2, K), torch.zeros(3, 2)
    weight[1] = 0
    for norm in (ops.weight_norm, reference.weight_norm):
        assert norm(weight, lora_A, lora_B, 2.0)[1] == LEAST_NORM


def test_no_gradient_and_no_tangent_flows_through_it():
    tensors = [torch.randn(s, requires_grad=True) for s in ((N, K), (2, K), (N, 2))]
    for norm in (ops.weight_norm, reference.weight_norm):
        assert not norm(*tensors, 0.5).requires_grad
        tangents = tuple(torch.ones_like(t) for t in tensors)
        given = tuple(t.detach() for t in tensors)
        _, tangent = torch.func.jvp(lambda *t, norm=norm: norm(*t, 0.5), given, tangents)
        assert not tangent.any()


@pytest.mark.parametrize(("size", "blocks"), [((512, 512), 1), ((8192, 4096), 2), ((0, 8), 1)])
def test_on_a_gpu_a_weight_is_cut_for_its_memory_alone(size, blocks):
    """Every block is four launches: a small layer's must not be sixteen times that."""
    N, K = size
    weight = torch.empty(N, K, dtype=torch.bfloat16, device="meta")
    lora_A, lora_B = torch.empty(4, K, device="meta"), torch.empty(N, 4, device="meta")
    with Counted() as counted:
        ops.weight_norm(weight, lora_A, lora_B, 0.5)
    assert counted.products == blocks + 2  # W·Aᵀ of each, A·Aᵀ, B times that
