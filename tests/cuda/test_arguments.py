"""Every tensor of every operation on another device than the rest: a sentence that names it."""

import codes_cases
import linear_expand_cases
import pytest
import sm90_backward_cases
import sm90_cases
import small_cases
import torch
from decode_cases import call, drawn
from on_machine import launched, launchers, needs_nvcc
from skinny_cases import Case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorafast.backends.cuda import decode, linear_expand, small, wgmma, wgmma_layer
from lorafast.backends.cuda.dequantize import dequantize
from lorafast.backends.cuda.mask import mask
from lorafast.core.assignment import Assignment
from lorafast.core.problem import Problem

pytestmark = needs_nvcc

SEED = torch.tensor([3])


class Calls(TorchDispatchMode):
    """Operations of the extension are kept and not run."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "lorafast_cuda":
            return func(*args, **(kwargs or {}))
        self.kept.append((func, list(args)))
        assert not kwargs
        return None


def a_skinny_call(operation, *sizes, **more):
    """With sums that are shared, so that it has scratch memory and counters."""
    case = Case(operation, *sizes, **more)
    return lambda: case.run(case.tensors())


def an_expand():
    problem = small_cases.Case("bf16", 9, 0, 40, 4, 0.1, bias=True).problem("expand")
    s, B, bias = (torch.ones(n, dtype=torch.bfloat16) for n in ((9, 4), (40, 4), (40,)))
    small.plan_expand(problem, small_cases.device()).run(s, B, 1.0, 0.1, SEED, bias)


def a_small_layer():
    case = small_cases.Case("bf16", 9, 16, 40, 4, 0.1, bias=True)
    x, W, A, B, bias = (
        torch.ones(n, dtype=torch.bfloat16) for n in ((9, 16), (40, 16), (4, 16), (40, 4), (40,))
    )
    problem = case.problem("lora_linear", wants=("y", "s"))
    small._run_lora_linear(problem, 64, 3)(x, W, A, B, 1.0, bias, 0.1, SEED)


def a_small_layers_backward():
    case = small_cases.Case("bf16", 9, 16, 40, 4, 0.1)
    dy, x, W, A, B, s = (
        torch.ones(n, dtype=torch.bfloat16)
        for n in ((9, 40), (9, 16), (40, 16), (4, 16), (40, 4), (9, 4))
    )
    problem = case.problem("lora_linear_backward", wants=("dx", "dA", "dB", "dbias"))
    run = small._run_lora_linear_backward(problem, 64, 3)
    run(dy, x, W, A, B, s, 1.0, 0.1, SEED)


def a_cut_gemm():
    case = linear_expand_cases.Case("bf16", 9, 600, 40, 4, dropout_p=0.1, bias=True, splits=2)
    x, W, s, B, bias = (
        torch.ones(n, dtype=torch.bfloat16) for n in ((9, 600), (40, 600), (9, 4), (40, 4), (40,))
    )
    linear_expand._run(case.problem(), 40, case.shares)(x, W, s, B, 1.0, bias, 0.1, SEED)


def a_hopper_gemm():
    case = sm90_cases.Case("bf16", 9, 16, 40, 4, dropout_p=0.1, bias=True)
    x, W, s, B, bias = (
        torch.ones(n, dtype=torch.bfloat16) for n in ((9, 16), (40, 16), (9, 4), (40, 4), (40,))
    )
    launch = wgmma.plan_linear_expand(case.problem(), sm90_cases.device())
    launch.run(x, W, s, B, 1.0, bias, 0.1, SEED)


def a_hopper_layer():
    x, W, A, B, bias = (
        torch.ones(n, dtype=torch.bfloat16) for n in ((9, 16), (40, 16), (4, 16), (40, 4), (40,))
    )
    problem = sm90_cases.Case("bf16", 9, 16, 40, 4, dropout_p=0.1).problem("lora_linear")
    run = wgmma_layer._run(problem, wgmma_layer.Helped(1, 128, 1, 0.0), 2, 2)
    run(x, W, A, B, 1.0, bias, 0.1, SEED)


def a_hopper_layers_backward():
    case = sm90_backward_cases.Case("bf16", 9, 16, 40, 4)
    given = [tensor.to(torch.bfloat16) for tensor in case.tensors()]
    case.launch().run(*given, 1.0, 0.0, None)


def a_dequantized(name):
    weight = codes_cases.drawn(name, 8, 64)
    dequantize(weight, torch.empty(weight.shape, dtype=weight.dtype))


def a_decode_step_over_codes(name):
    weight = codes_cases.drawn(name, 16, 64)
    layer = drawn(3, 64, 16, 9, adapter_of=[1, 0, -1])
    problem = Problem(
        "grouped_lora_linear", 3, 64, 16, 9, layer.x.dtype, layer.x.dtype, layer.x.device,
        weight.format, wants=("y", "s"), bias=True, adapters=4,
        format_parameters=weight.parameters,
    )  # fmt: skip
    run = decode._grouped_lora_linear(problem, decode._Shares(16, 1, 2, 1000, 9))
    matrices = layer.x, weight, layer.lora_A, layer.lora_B, layer.scaling
    run(*matrices, Assignment([1, 0, -1]), layer.bias)


CALLS = {
    "lora_linear_decode_four_bit": lambda: a_decode_step_over_codes("nf4"),
    "lora_linear_decode_eight_bit": lambda: a_decode_step_over_codes("int8"),
    "dequantize_four_bit": lambda: a_dequantized("nf4"),
    "dequantize_eight_bit": lambda: a_dequantized("fp8-blocks"),
    "mask": lambda: mask(SEED, 5, 9, 16),
    "expand": an_expand,
    "linear_expand": a_cut_gemm,
    "lora_linear": a_small_layer,
    "lora_linear_backward": a_small_layers_backward,
    "shrink": a_skinny_call("shrink", 140, 900, 16, dropout_p=0.1),
    "expand_backward": a_skinny_call("expand_backward", 300, 530, 16),
    "shrink_backward": a_skinny_call("shrink_backward", 900, 140, 16, dropout_p=0.1),
    "linear_expand_sm90": a_hopper_gemm,
    "lora_linear_sm90": a_hopper_layer,
    "lora_linear_backward_sm90": a_hopper_layers_backward,
    "lora_linear_decode": lambda: call(drawn(3, 264, 24, 9), 2),
    "grouped_lora_linear_decode": lambda: call(drawn(3, 264, 24, 9, adapter_of=[1, 0, -1]), 2),
}


def test_these_are_all_operations():
    launchers()
    offered = torch._C._dispatch_get_all_op_names()
    assert {f"lorafast_cuda::{name}" for name in CALLS} == {
        name for name in offered if name.startswith("lorafast_cuda::")
    }


@pytest.mark.parametrize("operation", CALLS)
def test_a_device_that_is_too_old(operation):
    """Its code would trap, after which a process has no CUDA any more. The mask, decoding and
    dequantizing serve it."""
    launchers()
    serve = "mask", "dequantize_four_bit", "dequantize_eight_bit"
    if operation in serve or operation.endswith("lora_linear_decode"):
        with launched(75) as run:
            CALLS[operation]()
        assert len(run.launches) == 1
        return
    needs = "9.0" if operation.endswith("sm90") else "8.0"
    skinny = operation in ("expand", "shrink", "expand_backward", "shrink_backward")
    of = " of bfloat16" * skinny  # in others it serves them
    said = f"{operation}{of} needs compute capability {needs}, and cuda.* has 7.5"
    with launched(75) as run, pytest.raises(RuntimeError, match=said):
        CALLS[operation]()
    assert not run.launches


@pytest.mark.parametrize("operation", CALLS)
def test_a_tensor_on_another_device(operation):
    launchers()
    with Calls() as calls:
        CALLS[operation]()
    ((func, args),) = calls.kept
    assert func._schema.name == f"lorafast_cuda::{operation}"
    for i, argument in enumerate(func._schema.arguments):
        if "Tensor" not in str(argument.type):
            continue
        assert isinstance(args[i], Tensor), f"{argument.name} is not given"
        elsewhere = [*args[:i], args[i].to("meta"), *args[i + 1 :]]
        with launched(80) as run, pytest.raises(RuntimeError, match=f"{argument.name} is on meta"):
            func(*elsewhere)
        assert not run.launches
