"""What the backend plans, executed: a layer's forward and backward by its plans, held to the contract.

Launches run on the machine, PyTorch's GEMMs on the CPU.
"""

import functools

import pytest
import torch
from cards import CUDA, T4, Device, problem
from on_machine import launched, needs_nvcc
from small_cases import Reference

from lorafast import reference
from lorafast.backends import dropout
from lorafast.backends.cuda import Cuda, native
from lorafast.backends.cuda import backend as module
from lorafast.core.assignment import Assignment
from lorafast.ops.problems import by_plans
from lorafast.reference import contract, wide

pytestmark = needs_nvcc

DEVICES = {
    80: Device.known_by("NVIDIA A100-SXM4-80GB", 80, 4, 1.41e9, 1.593e9, 5120),
    90: Device.known_by("NVIDIA H200", 90, 4, 1.98e9, 3.2e9, 6144),
}
"""With few SMs, so that what a launch shares out is little."""
M, K, N, r = 21, 72, 40, 5


@pytest.fixture
def operations(monkeypatch):
    """The backend's, as on a device of an architecture; its tensors are the CPU's."""

    def on(arch):
        monkeypatch.setattr(module, "gpu_of", lambda device: DEVICES[arch])
        monkeypatch.setattr(native, "why_not_here", lambda device: None)
        backend = Cuda()
        return by_plans(functools.cache(lambda p: backend.plan(p._replace(device=CUDA))))

    return on


def draw(dtype, adapter_dtype):
    shapes = {"x": (M, K), "dy": (M, N), "weight": (N, K), "bias": (N,)}
    drawn = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    drawn |= {"lora_A": torch.randn(r, K).to(adapter_dtype)}
    return drawn | {"lora_B": torch.randn(N, r).to(adapter_dtype)}


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
    ],
    ids=["bf16 fp32", "fp16", "fp32"],
)
def test_a_layer_by_the_backends_plans(operations, dtype, adapter_dtype, dropout_p, arch):
    t = draw(dtype, adapter_dtype)
    seed = torch.tensor([1234567]) if dropout_p else None
    low, run = wide(dtype), operations(arch)

    def results(run, cast):
        """``s``, ``y`` and the gradients, each of what was given, so that none has another's error."""
        x, dy, weight, bias = (cast(t[name]) for name in ("x", "dy", "weight", "bias"))
        A, B = cast(t["lora_A"], adapter_dtype), cast(t["lora_B"], adapter_dtype)
        given_s, given_ds = cast(s, low), cast(ds, low)
        own_ds, dB = run.expand_backward(dy, given_s, B, 0.7)[:2]
        return (
            run.shrink(x, A, dropout_p, seed),
            run.linear_expand(x, weight, given_s, B, 0.7, bias),
            own_ds,
            dB,
            run.shrink_backward(given_ds, x, dropout_p, seed, A.dtype),
            run.linear_expand(
                dy, weight, given_ds, A.t(), 1.0, None, dropout_p, seed, transposed=True
            ),
        )

    s, ds = torch.randn(M, r).to(low), torch.randn(M, r).to(low)

    class OnMachine:
        def __getattr__(self, name):
            def call(*arguments, **named):
                with launched(arch):
                    return getattr(run, name)(*arguments, **named)

            return call

    assert contract.compare(results, OnMachine(), dtype).why_broken is None


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_a_forward_at_once(operations, dropout_p):
    """By whichever plan the backend has for a whole layer, with ``s``."""
    t = draw(torch.bfloat16, torch.float32)
    seed = torch.tensor([7]) if dropout_p else None

    def results(of, cast):
        x, weight, bias = (cast(t[name]) for name in ("x", "weight", "bias"))
        A, B = (cast(t[name], torch.float32) for name in ("lora_A", "lora_B"))
        return of.lora_linear(x, weight, A, B, 0.7, bias, dropout_p, seed)

    class OnMachine:
        def lora_linear(self, *arguments):
            with launched(90) as run:
                found = operations(90).lora_linear(*arguments)
            assert run.launches
            return found

    def call(of, cast):
        return results(of if isinstance(of, OnMachine) else Reference, cast)

    assert contract.compare(call, OnMachine(), torch.bfloat16).why_broken is None


def test_pytorchs_dropout_reads_the_kernels_mask(monkeypatch):
    from lorafast.backends.cuda import mask

    monkeypatch.setitem(dropout._makers, "cpu", lambda device: mask.mask)
    x, seed = torch.randn(5, 37), torch.tensor([-3])
    with launched(80) as run:
        found = dropout.dropout(x, 0.3, seed)
    assert [launch.op for launch in run.launches] == ["mask"]
    assert torch.equal(found, reference.dropout(x, 0.3, seed))


@pytest.mark.parametrize("arch", [75, pytest.param(90, marks=pytest.mark.slow)])
def test_a_decode_step_of_a_mixed_batch(monkeypatch, arch):
    """By the plan of ``grouped_lora_linear``, which turns the assignment into indices."""
    monkeypatch.setattr(module, "gpu_of", lambda device: DEVICES.get(arch, T4))
    monkeypatch.setattr(native, "why_not_here", lambda device: None)
    n, half = 3, torch.float16
    x, weight, bias = (torch.randn(shape).to(half) for shape in ((4, K), (N, K), (N,)))
    lora_A, lora_B, scaling = torch.randn(n, r, K), torch.randn(n, N, r), torch.rand(n)
    adapter_of = [2, -1, 0, 2]
    p = problem(
        "grouped_lora_linear", 4, K, N, r, half, adapter_dtype=torch.float32, adapters=n,
        wants=("y", "s"), bias=True,
    )  # fmt: skip
    plan = Cuda().plan(p)
    with launched(arch) as run:
        y, s = plan.run(x, weight, lora_A, lora_B, scaling, Assignment(adapter_of), bias)
    assert [launch.op for launch in run.launches] == ["grouped_lora_linear_decode"]
    given = [t.double() for t in (x, weight, lora_A, lora_B, scaling)]
    exact = reference.grouped_lora_linear(*given, adapter_of, bias.double())
    rounded = [t.to(half) for t in (lora_A, lora_B, scaling)]
    eager = reference.grouped_lora_linear(x, weight, *rounded, adapter_of, bias)
    assert contract.why_broken(y, eager, exact, exact / 2) is None
    assert torch.equal(s[1], torch.zeros(r))
