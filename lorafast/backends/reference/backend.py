"""``reference``: the definitions of ``lorafast.reference``, served as a backend."""

from functools import partial

import torch
from torch import Tensor

from lorafast import operands, reference
from lorafast.backends import composed
from lorafast.backends.plan import Backend, Plan, Refusal, Run
from lorafast.backends.reference import grouped_lora_linear as grouped
from lorafast.core.dtypes import wide
from lorafast.core.problem import (
    BOTTLENECK_OPERATIONS,
    GROUPED_OPERATIONS,
    LAYER_OPERATIONS,
    SCALED_OPERATIONS,
    WANTS,
    WEIGHT_NORM,
    Problem,
)
from lorafast.operands import Weight
from lorafast.reference.bottleneck import pre_activation


class Reference(Backend):
    """Serves everything, and is chosen for nothing: what it computes is right, not fast."""

    name = "reference"
    plain_pytorch = True
    operations = Backend.operations | frozenset(
        (*GROUPED_OPERATIONS, *BOTTLENECK_OPERATIONS, *SCALED_OPERATIONS, WEIGHT_NORM)
    )

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
    if problem.operation == "bottleneck":
        return partial(_bottleneck, problem.activation, "a" in problem.wants)
    if problem.operation == "bottleneck_backward":
        return partial(_bottleneck_backward, problem)
    if problem.operation == "scaled_linear":
        return partial(_scaled_linear, problem)
    if problem.operation == "scaled_linear_backward":
        return partial(_scaled_linear_backward, problem)
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


def _bottleneck(
    activation: str,
    want_a: bool,
    h: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    scaling: float,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    y = reference.bottleneck(h, down, up, down_bias, up_bias, scaling, activation, residual)
    return y, pre_activation(h, down, down_bias) if want_a else None


def _bottleneck_backward(
    problem: Problem,
    dy: Tensor,
    h: Tensor | None,
    a: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    scaling: float,
) -> tuple[Tensor | None, ...]:
    p = problem
    # What isn't here is for results that aren't wanted: NaN would show in any that is.
    h = dy.new_full((p.M, p.K), torch.nan) if h is None else h
    a = dy.new_full((p.M, p.r), torch.nan, dtype=wide(p.dtype)) if a is None else a
    down = dy.new_full((p.r, p.K), torch.nan, dtype=p.adapter_dtype) if down is None else down
    up = dy.new_full((p.N, p.r), torch.nan) if up is None else up
    found = reference.bottleneck_backward(dy, h, a, down, up, scaling, p.activation, p.residual)
    names = WANTS["bottleneck_backward"]
    return tuple(
        tensor if name in p.wants else None for name, tensor in zip(names, found, strict=True)
    )


def _scaled_linear(
    problem: Problem, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    y = reference.scaled_linear(x, weight, scale, bias, problem.scales_input)
    keeps = "z" in problem.wants
    return y, torch.nn.functional.linear(x, weight, bias) if keeps else None


def _scaled_linear_backward(
    problem: Problem, dy: Tensor, kept: Tensor | None, weight: Tensor | None, scale: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    dx = dscale = None
    if "dx" in problem.wants:
        assert weight is not None
        dx = reference.scaled_dx(dy, weight, scale, problem.scales_input)
    if "dscale" in problem.wants:
        assert kept is not None
        dscale = reference.scaled_dscale(dy, kept, weight, scale.dtype, problem.scales_input)
    return dx, dscale


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
