"""The factored norm of DoRA against the one that makes ``W + scaling · B·A``."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from toy_formats import FORMATS, held

from lorafast import operands, ops, reference
from lorafast.backends import weight_norm
from lorafast.core.dtypes import LEAST_NORM

pytestmark = pytest.mark.usefixtures("toy_formats")
K, N = 24, 40


class Counted(TorchDispatchMode):
    products = norms = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        self.norms += function is torch.ops.lorafast.weight_norm.default
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


@pytest.mark.parametrize("columns", [3, 63, 65, 129, 1000])
@pytest.mark.parametrize("rows", [2, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_transposed_weight_is_read_by_columns(columns, rows, dtype):
    """In blocks of them, the last of which may be smaller."""
    weight = torch.randn(columns, rows).to(dtype).t()
    assert weight_norm._is_transposed(weight)
    lora_A, lora_B = torch.randn(3, columns), torch.randn(rows, 3)
    found = ops.weight_norm(weight, lora_A, lora_B, 0.7)
    exact = reference.weight_norm(weight.double(), lora_A.double(), lora_B.double(), 0.7)
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
        weight_norm.weight_norm(weight, lora_A, lora_B, 0.5)
    assert counted.products == blocks + 2  # W·Aᵀ of each, A·Aᵀ, B times that


@pytest.mark.parametrize("factor", [None, torch.tensor(0.7)], ids=["number", "tensor"])
@pytest.mark.parametrize("format", FORMATS)
def test_opcheck(format, factor):
    weight = FORMATS[format](torch.randn(N, K))
    given = (torch.randn(5, K, requires_grad=True), torch.randn(N, 5, requires_grad=True))
    stored, described = operands.stored(weight), operands.describe(weight)
    operation = torch.ops.lorafast.weight_norm.default
    torch.library.opcheck(operation, (*given, stored, described, 0.7, factor))
    found = operation(*given, stored, described, 0.7, factor)
    assert torch.equal(found, ops.weight_norm(weight, *given, 0.7 if factor is None else factor))
    assert not found.requires_grad


def test_the_registered_operation_refuses_what_does_not_fit():
    weight, lora_A, lora_B = torch.randn(N, K), torch.randn(5, K + 1), torch.randn(N, 5)
    with pytest.raises(ValueError, match="lora_A has shape"):
        torch.ops.lorafast.weight_norm(lora_A, lora_B, [weight], "dense", 0.5)


def test_a_mode_sees_one_operation_whose_flops_are_counted():
    tensors = torch.randn(N, K), torch.randn(5, K), torch.randn(N, 5)
    with Counted() as counted, FlopCounterMode(display=False) as flops:
        ops.weight_norm(*tensors, 0.5)
    assert counted.norms == 1
    assert flops.get_total_flops() == 2 * 5 * (N * K + 5 * K + N * 5)


@pytest.mark.parametrize("format", FORMATS)
def test_compiled_it_is_one_call(format):
    """No gradient flows through it there either, and another scaling makes no other graph."""
    torch._dynamo.reset()
    targets = []

    def kept(graph, inputs):
        targets.append([n.target for n in graph.graph.nodes if n.op == "call_function"])
        return graph

    compiled = torch.compile(ops.weight_norm, fullgraph=True, backend=kept)
    weight = FORMATS[format](torch.randn(N, K))
    given = (torch.randn(5, K, requires_grad=True), torch.randn(N, 5, requires_grad=True))
    for scaling in (0.5, 0.7, -1.5):
        found = compiled(weight, *given, scaling)
        doubled = [t.double() for t in (operands.as_dense(weight), *given)]
        exact = reference.weight_norm(*doubled, scaling)
        assert (found - exact).norm() <= 2 * eps(torch.float32) * exact.norm()
        assert not found.requires_grad
    assert len(targets) == 2  # the second makes a variable of the scaling
    for called in targets:
        assert called.count(torch.ops.lorafast.weight_norm) == 1
        assert not {torch.mm, torch.addmm, torch.linalg.vector_norm} & set(called)
