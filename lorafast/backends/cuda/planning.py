"""What the CUDA C++ kernels are launched with for a problem on a device: which family serves it, and
how a ``linear_expand`` that isn't fused is made of ``expand`` and PyTorch's GEMM.

Pure functions of a problem and a made-up or real ``Device``; nothing is loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorafast import operands
from lorafast.backends import dequantized
from lorafast.backends.cost import Device, record_of
from lorafast.backends.cuda import (
    decode,
    dequantize,
    linear_expand,
    skinny,
    small,
    wgmma,
    wgmma_backward,
    wgmma_layer,
)
from lorafast.backends.cuda.launch import NONE, Choices, Launch
from lorafast.backends.hybrid import hybrid
from lorafast.backends.plan import Run
from lorafast.core.dtypes import wide
from lorafast.core.problem import (
    DENSE,
    WANTS,
    Layout,
    Problem,
)

WHOLE = ("lora_linear", "lora_linear_backward", "grouped_lora_linear")
"""Layers, forward and backward, that are served in one launch, where a family can."""
Planner = Callable[[Problem, Device, Choices], Launch | str]
FAMILIES: dict[str, tuple[Planner, ...]] = {
    "shrink": (skinny.plan_shrink,),
    "expand_backward": (skinny.plan_expand_backward,),
    "shrink_backward": (skinny.plan_shrink_backward,),
    "expand": (small.plan_expand,),
    "linear_expand": (linear_expand.plan_linear_expand, wgmma.plan_linear_expand),
    "lora_linear": (
        decode.plan_lora_linear,
        small.plan_lora_linear,
        wgmma_layer.plan_lora_linear,
    ),
    "lora_linear_backward": (
        small.plan_lora_linear_backward,
        wgmma_backward.plan_lora_linear_backward,
    ),
    "grouped_lora_linear": (decode.plan_grouped_lora_linear,),
}
"""Who is asked for an operation or a whole layer."""
_OLDEST, _OLDEST_IN_BFLOAT16 = 75, 80
"""Families may need more, and those of whole layers less in bfloat16."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Hybrid(Launch):
    """``linear_expand`` as ``expand``, with the bias, and PyTorch's GEMM accumulated onto its result.

    In float16, whose low-rank term may not be rounded before it is added, the GEMM comes first, with the
    bias, and ``expand`` adds its float32 onto that in one pass (``onto``).

    sm_75 has nothing else. A fused GEMM saves that pass over y, 9 % of cuBLAS's time on a T4 at K = 4096
    by their bytes and FLOPs: it would have to be within that, without ``cp.async`` and with ``mma.sync``
    of half the depth.
    """

    expand: Launch
    onto: bool

    @property
    def lines(self) -> tuple[str, ...]:
        """What is launched, a line each."""
        if self.onto:
            return "PyTorch's GEMM", f"{self.expand.line}, added onto that in float32"
        return self.expand.line, "addmm_: PyTorch's GEMM, accumulated onto that"


def why_refused(p: Problem, device: Device | None) -> str | None:
    """Why no kernel serves the problem, before any family is asked; or None."""
    for whose, dtype in (("dtype", p.dtype), ("adapter", p.adapter_dtype)):
        if dtype not in _DTYPES:
            said = "is" if whose == "adapter" else "of the layer is"
            return f"the {whose} {said} {dtype}, the kernels have float16, bfloat16 and float32"
    if not p.plain:
        return "an input is a tensor subclass or on another device: the kernels read plain tensors"
    if device is None:
        return f"the inputs are on {p.device}, the kernels run on CUDA devices"
    if p.format != DENSE and dequantized.reads_weight(p):
        return dequantize.why_refused(p)
    return None


def why_too_old(p: Problem, device: Device) -> str | None:
    """Why the device can't run the kernels of the operation, or None."""
    narrow = p.dtype is torch.bfloat16 and p.operation not in WHOLE
    oldest = _OLDEST_IN_BFLOAT16 if narrow else _OLDEST
    if device.capability >= oldest:
        return None
    has, needs = (".".join(map(str, divmod(c, 10))) for c in (device.capability, oldest))
    of = f"{p.operation} in bfloat16" if narrow else p.operation
    return f"compute capability is {has}, the kernels of {of} need {needs}"


def launches_of(p: Problem, device: Device, fixed: Choices = NONE) -> list[Launch | str]:
    """What each family says to an operation or a whole layer. With ``fixed`` its launch has these
    choices, all that it has; else those that ``lorafast tune`` found, where they can be.

    Where a layer's gradients may be asked for, its launch leaves ``s``."""
    if p.operation == "lora_linear" and p.graph:
        p = p._replace(wants=WANTS["lora_linear"])
    reason = why_too_old(p, device)
    if reason is not None:
        return [reason]
    families = FAMILIES.get(p.operation, ())
    if p.operation == "linear_expand":
        families = (*families, plan_hybrid)
    if fixed:
        return [_chosen(plan, p, device, fixed) for plan in families]
    record = record_of(p, device.name)
    tuned = NONE if record is None or record.choices is None else record.choices
    answers = [_chosen(plan, p, device, tuned) for plan in families] if tuned else []
    return (
        answers
        if any(isinstance(answer, Launch) for answer in answers)
        else [plan(p, device, NONE) for plan in families]
    )


def _chosen(plan: Planner, p: Problem, device: Device, fixed: Choices) -> Launch | str:
    answer = plan(p, device, fixed)
    if isinstance(answer, str):
        return answer
    for name, value in fixed.items():
        has = answer.choices.get(name)
        if has != value:
            return f"{name} can't be {value}" + ("" if has is None else f", the launch has {has}")
    if fixed.keys() != answer.choices.keys():  # another family's, or not all
        return f"{', '.join(fixed)} is given, there is a choice of {', '.join(answer.choices)}"
    return answer


def plan_hybrid(p: Problem, device: Device, fixed: Choices = NONE) -> Hybrid | str:
    """``y``, or transposed ``dx``: all but the GEMM by ``expand``; or why not."""
    (expand,) = launches_of(as_expand(p), device)
    if isinstance(expand, str):
        return expand
    onto, columns = p.dtype is not wide(p.dtype), p.K if p.transposed else p.N
    size = p.dtype.itemsize
    if onto:  # which it reads
        expand = replace(expand, moved=expand.moved + p.M * columns * size)
    gemm = (p.M * p.K + p.N * p.K + p.M * p.N + (0 if onto else p.M * columns)) * size
    return Hybrid(
        run=_after_gemm(expand.run, p.transposed) if onto else hybrid(expand.run, p.transposed),
        line="expand and PyTorch's GEMM", flops=expand.flops + 2.0 * p.M * p.K * p.N,
        moved=expand.moved + float(gemm), launches=2, choices={"fused": 0},
        expand=expand, onto=onto,
    )  # fmt: skip


def as_expand(p: Problem) -> Problem:
    """The low-rank term of a ``linear_expand``, with the bias where the GEMM doesn't have it."""
    N, layouts = p.N, p.layouts
    if p.transposed:
        A = layouts.lora_A
        N, layouts = p.K, layouts._replace(lora_B=Layout(A.columns, A.rows, A.huge))
    return p._replace(
        operation="expand", K=0, N=N, transposed=False, bias=p.bias and wide(p.dtype) is p.dtype,
        layouts=layouts,
    )  # fmt: skip


def gemm_alone(transposed: bool) -> Run:
    """``y = x·Wᵀ + bias``, or transposed ``x·W``: without ranks there is no other term."""

    def run(
        x: Tensor,
        weight: Tensor,
        s: Tensor,
        lora_B: Tensor,
        scaling: float,
        bias: Tensor | None = None,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> Tensor:
        if not transposed:
            return operands.linear(x, weight, bias)
        y = operands.linear_transposed(x, weight)
        return y if bias is None else y.add_(bias)

    return run


def _after_gemm(expand: Run, transposed: bool) -> Run:
    """``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias``: the second term onto the others, which are rounded."""

    def run(
        x: Tensor,
        weight: Tensor,
        s: Tensor,
        lora_B: Tensor,
        scaling: float,
        bias: Tensor | None = None,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> Tensor:
        by_gemm = operands.linear_transposed if transposed else operands.linear
        y = by_gemm(x, weight) if bias is None else operands.linear(x, weight, bias)
        return expand(s, lora_B, scaling, dropout_p, seed, None, y)

    return run
