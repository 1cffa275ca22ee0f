"""What ``lorafast.backends.cuda.decode`` plans: its launches run, its refusals are sentences."""

import re

import pytest
import torch
from decode_cases import BF16, F16, F32, call, drawn
from on_machine import launched, launchers, needs_nvcc
from ptx.counts import least

from lorafast.backends.cost import Device
from lorafast.backends.cuda.cost import fastest
from lorafast.backends.cuda.decode import (
    late_seconds,
    own_seconds,
    plan_grouped_lora_linear,
    plan_lora_linear,
)
from lorafast.backends.cuda.tables import DECODE, row_of
from lorafast.core.assignment import Assignment
from lorafast.core.problem import Layout, Layouts, Problem
from lorafast.reference import contract

GPUS = {
    80: Device.known_by("A100", 80, 108),
    86: Device.known_by("RTX 3090", 86, 82),
    90: Device.known_by("H100", 90, 132),
}
H100 = GPUS[90]
CPU = torch.device("cpu")


def problem_of(layer, wants=("y", "s")):
    (M, K), N = layer.x.shape, layer.weight.shape[0]
    operation, n = "lora_linear", 0
    if layer.adapter_of is not None:
        operation, n = "grouped_lora_linear", layer.lora_A.shape[0]
    matrices = ("x", "weight", "lora_A", "lora_B")
    return Problem(
        operation, M, K, N, layer.r, layer.x.dtype, layer.lora_A.dtype, CPU, wants=wants,
        bias=layer.bias is not None, adapters=n,
        layouts=Layouts(**{name: Layout.of(getattr(layer, name)) for name in matrices}),
    )  # fmt: skip


@needs_nvcc
@pytest.mark.parametrize("wants", [("y",), ("y", "s")], ids=["y", "y and s"])
@pytest.mark.parametrize("r", [16, 40], ids=["no helpers", "helpers"])
def test_a_layer(r, wants):
    layer = drawn(3, 776, 40, r)
    plan = plan_lora_linear(problem_of(layer, wants), H100)
    assert ("each makes its own s" in plan.line) == (r == 16)
    with launched(90) as ran:
        results = plan.run(
            layer.x, layer.weight, layer.lora_A, layer.lora_B, 0.5, layer.bias, 0.0, None
        )
    _hold(layer, wants, results)
    assert len(ran.launches) == plan.launches == 1
    assert ran.launches[0].op == "lora_linear_decode"


@needs_nvcc
@pytest.mark.parametrize("known", [True, False], ids=["known to the host", "a tensor"])
@pytest.mark.parametrize("dtype", [F32, torch.float64], ids=["scaling fp32", "scaling fp64"])
def test_a_mixed_batch(known, dtype):
    layer = drawn(6, 776, 40, 40, F16, F32, adapter_of=[1, -1, 0], n=2)
    layer.scaling = layer.scaling.to(dtype)
    assignment = Assignment([1, -1, 0])
    if not known:  # as a GPU has it
        assignment.adapter_of = layer.adapter_of
    plan = plan_grouped_lora_linear(problem_of(layer), H100)
    matrices = layer.x, layer.weight, layer.lora_A, layer.lora_B
    with launched(80) as ran:
        results = plan.run(*matrices, layer.scaling, assignment, layer.bias)
    _hold(layer, ("y", "s"), results)
    assert [launch.op for launch in ran.launches] == ["grouped_lora_linear_decode"]


@needs_nvcc
def test_no_rows():
    layer = drawn(1, 776, 40, 16, adapter_of=[0], n=2)
    layer.x = layer.x[:0]
    plan = plan_grouped_lora_linear(problem_of(layer), H100)
    with launched(80) as ran:
        y, s = plan.run(
            layer.x, layer.weight, layer.lora_A, layer.lora_B, layer.scaling, Assignment([]), None
        )
    assert (y.shape, s.shape, ran.launches) == ((0, 40), (0, 16), [])


def _hold(layer, wants, results):
    y, s = results
    assert (s is not None) == ("s" in wants)
    found = {"y": y} if s is None else {"y": y, "s": s}
    bounds = {name: layer.bounds()[name] for name in found}
    assert contract.why_any_broken(found, bounds) is None


SERVED = Problem("lora_linear", 4, 512, 256, 16, BF16, BF16, CPU, wants=("y",))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"M": 17}, "x has 17 rows, the kernel for decoding takes at most 16"),
        ({"dropout": True}, "there is dropout, the kernel for decoding has none"),
        ({"format": "other"}, "the weight is stored as other, the kernels read dense ones"),
        ({"dtype": torch.float64}, "x is torch.float64, the kernel"),
        ({"adapter_dtype": F16}, "the adapters are torch.float16, expected torch.bfloat16 or"),
        ({"r": 0}, "the rank is 0, the kernel for decoding takes 1 to 1048575"),
        ({"r": 1 << 20}, "the rank is 1048576, the kernel for decoding takes 1 to 1048575"),
        ({"plain": False}, "an input is a tensor subclass or on another device"),
        ({"K": 0}, "the weight is 256 x 0, the kernel for decoding needs elements"),
        ({"layouts": Layouts(weight=Layout(0, 16))}, "the weight's rows aren't contiguous"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_refusal_is_a_sentence(change, sentence):
    assert not isinstance(plan_lora_linear(SERVED, H100), str)
    for plan in (plan_lora_linear, plan_grouped_lora_linear):
        refusal = plan(SERVED._replace(**change), H100)
        assert isinstance(refusal, str)
        assert refusal.startswith(sentence)


def test_helpers_are_as_many_as_have_room():
    """Beside 130 CTAs of W on 132 SMs, which have room for two each on tensor cores."""
    p = SERVED._replace(K=4096, N=16 * 130)
    assert "4 CTAs more make s" in plan_lora_linear(p, H100).line
    without = p._replace(dtype=torch.float32, adapter_dtype=torch.float32)
    assert "2 CTAs more make s" in plan_lora_linear(without, H100).line


@pytest.mark.parametrize(
    ("arch", "M", "K", "N", "r", "own"),
    [
        (90, 1, 256, 256, 16, True),
        (90, 1, 1024, 1024, 16, True),
        (90, 16, 1024, 1024, 16, True),
        (90, 1, 512, 2048, 16, True),
        (90, 1, 1024, 1024, 64, False),  # four times as much of A for every CTA
        (90, 1, 2048, 2048, 16, False),  # W takes as long as helpers
        (90, 1, 1024, 4096, 16, False),
        (86, 1, 1024, 1024, 16, False),  # the same, of slower memory
        (90, 1, 4096, 4096, 16, False),
    ],
)
def test_who_makes_s(arch, M, K, N, r, own):
    p = SERVED._replace(M=M, K=K, N=N, r=r)
    line = plan_lora_linear(p, GPUS[arch]).line
    assert ("each makes its own s" in line) == own
    # Bytes from memory: what every CTA loads of A comes from L2.
    assert plan_lora_linear(p, GPUS[arch]).moved < 1.02 * least("lora_linear", M, K, N, r) + 2**16


def test_s_of_helpers_is_late_where_W_is_small():
    """As decode.py says of an H100, with its memory as the data sheet has it."""
    card = Device.known_by("NVIDIA H100 80GB HBM3", 90, 132, 1.98e9, 2.619e9, 5120)
    small, large = (SERVED._replace(K=n, N=n, M=1) for n in (1024, 2048))
    assert own_seconds(small, card, 64, 1) == pytest.approx(1.2e-6, rel=0.05)
    assert late_seconds(small, card, 64, 1, 2, 2) == pytest.approx(1.8e-6, rel=0.05)
    assert late_seconds(large, card, 128, 1, 4, 4) == 0
    assert own_seconds(large, card, 128, 1) > 1e-6
    # CTAs behind helpers start when those have ended.
    full = SERVED._replace(K=1024, N=16 * 264, M=1)
    assert late_seconds(full, card, 264, 1, 2, 2) > late_seconds(full, card, 262, 1, 2, 2)


@needs_nvcc
@pytest.mark.parametrize("arch", [75, 80])
@pytest.mark.parametrize("M", [8, 16])
def test_an_sm_has_the_CTAs_that_the_table_says(M, arch):
    with launched(arch) as ran:
        call(drawn(M, 40, 16, 1), 0)
    ptx = launchers().ptx_of(ran.launches[0].symbol, arch)
    row = row_of(DECODE, arch)
    (resident,) = re.findall(r"\.minnctapersm (\d+)", ptx)
    assert int(resident) == (row.resident if M == 8 else row.resident_16)


@pytest.mark.parametrize("M", [1, 8, 16])
@pytest.mark.parametrize("n", [256, 1024, 4096])
@pytest.mark.parametrize("r", [16, 64])
def test_no_other_kernel_takes_what_it_is_for(r, n, M):
    for card in GPUS.values():
        found = fastest(SERVED._replace(M=M, K=n, N=n, r=r), card)
        assert found.line.startswith("lora_linear_decode")


def test_an_old_device_is_refused():
    old = Device.known_by("Tesla V100", 70, 80)
    assert plan_lora_linear(SERVED, old) == "Tesla V100 is sm_70, the kernels need sm_75 or later"


def test_what_a_plan_says():
    large = SERVED._replace(K=4096, N=4096, r=64, M=1)
    plan = plan_lora_linear(large, H100)
    assert plan.line == (
        "lora_linear_decode 1 x 4096 -> 4096: 256 CTAs of 16 rows of W, 8 CTAs more make s"
    )
    assert plan.flops == 2 * (4096 * 4096 + 64 * 8192)
    assert 0 < plan.moved - 2 * 4096 * 4096 < 0.1 * 4096 * 4096
    odd = large._replace(layouts=Layouts(weight=Layout(2)))
    assert "element by element" in plan_lora_linear(odd, H100).line
