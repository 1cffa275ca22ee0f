"""``reference``: the definitions of ``lorafast.reference``, served as a backend."""

from functools import partial

import torch
from torch import Tensor

from lorafast import operands, reference
from lorafast.backends import composed
from lorafast.backends.plan import Backend, Plan, Refusal, Run
from lorafast.backends.reference import grouped_lora_linear as grouped
from lorafast.core.problem import GROUPED_OPERATIONS, LAYER_OPERATIONS, WEIGHT_NORM, Problem
from lorafast.operands import Weight


class Reference(Backend):
    """Serves everything, and is chosen for nothing: what it computes is right, not fast."""

    name = "reference"
    plain_pytorch = True
    operations = Backend.operations | frozenset((*GROUPED_OPERATIONS, WEIGHT_NORM))

    def plan(self, problem: Problem) -> Plan | Refusal:
        """One plain PyTorch expression each."""
        if problem.operation in LAYER_OPERATIONS:
            return composed.plan_or_refusal(problem, self.plan)
        if problem.operation == "grouped_lora_linear":
            return Plan(self.name, grouped.grouped_lora_linear, ("plain PyTorch, by adapter",))
        if problem.operation == "grouped_lora_linear_backward":
            alone = composed.plan_or_refusal(grouped.of_one_adapter(problem), self.plan)
            if isinstance(alone, Refusal):
                return alone
            run = grouped.grouped_lora_linear_backward(alone.run, problem.wants)
            return Plan(self.name, run, ("plain PyTorch, by adapter",))
        return Plan(self.name, _operation(problem), ("plain PyTorch",))


def _operation(problem: Problem) -> Run:
    """What runs one of the operations."""
    if problem.operation == "shrink":
        return reference.shrink
    if problem.operation == "expand":
        return partial(reference.expand, dtype=problem.dtype)
    if problem.operation == "linear_expand":
        return partial(_linear_expand, problem.transposed)
    if problem.operation == WEIGHT_NORM:
        return _weight_norm
    if problem.operation == "expand_backward":
        return partial(_expand_backward, problem.wants, problem.adapter_dtype)
    return partial(_shrink_backward, problem.adapter_dtype)


def _linear_expand(
    transposed: bool,
    x: Tensor,
    weight: Weight,
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    dense = operands.as_dense(weight)
    x = x if transposed else operands.activations(x, weight)
    return reference.linear_expand(
        x, dense, s, lora_B, scaling, bias, dropout_p, seed, transposed=transposed
    )


def _weight_norm(weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
    return reference.weight_norm(operands.as_dense(weight), lora_A, lora_B, scaling)


def _expand_backward(
    wants: tuple[str, ...],
    dtype: torch.dtype,
    dy: Tensor,
    s: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    ds = dB = None
    if "ds" in wants:
        assert lora_B is not None
        ds = reference.expand_ds(dy, lora_B, scaling)
    if "dB" in wants:
        assert s is not None
        dB = reference.expand_dB(dy, s, scaling, dtype)
    return ds, dB, dy.sum(0) if "dbias" in wants else None


def _shrink_backward(
    dtype: torch.dtype, ds: Tensor, x: Tensor, dropout_p: float, seed: Tensor | None
) -> Tensor:
    return reference.shrink_backward(ds, x, dropout_p, seed, dtype)
