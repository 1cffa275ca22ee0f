"""``aten``: PyTorch's own calls, which serve everything: the baseline of every other backend."""

from dataclasses import replace

from lorafast import operands
from lorafast.backends import composed, cost, scaled_linear
from lorafast.backends import grouped_lora_linear as grouped
from lorafast.backends.aten import bottleneck, operations
from lorafast.backends.plan import Backend, Plan, Refusal, Run
from lorafast.backends.weight_norm import weight_norm
from lorafast.core.problem import (
    BOTTLENECK_OPERATIONS,
    GROUPED_OPERATIONS,
    LAYER_OPERATIONS,
    SCALED_OPERATIONS,
    WEIGHT_NORM,
    Problem,
)
from lorafast.operands import DENSE

SMALL = 1 << 22
"""Multiply-adds of the base GEMM, on a CPU, below which the cost of a call counts most."""
_MERGED = 1 << 16
"""Multiply-adds of ``W + scaling · B·A`` up to which making it costs less than the call that it saves:
measured on one thread, 0.6 to 0.97 of the time up to here, 1.06 and more from twice as many."""
_EXACT = 4
"""Bytes of an element, at least, of a W that the update may be added to."""


class Aten(Backend):
    """PyTorch's own calls in their best order; any tensors, dtypes, devices and formats."""

    name = "aten"
    operations = Backend.operations | frozenset(
        (*GROUPED_OPERATIONS, *BOTTLENECK_OPERATIONS, *SCALED_OPERATIONS, WEIGHT_NORM)
    )

    def plan(self, problem: Problem) -> Plan | Refusal:
        """A small layer in few calls that PyTorch differentiates, another operation by operation."""
        if problem.operation in LAYER_OPERATIONS:
            if problem.operation == "lora_linear" and _is_small(problem):
                return _small(problem)
            together = composed.plan_or_refusal(problem, self.plan)
            return cost.priced(together, problem) if isinstance(together, Plan) else together
        if problem.operation in GROUPED_OPERATIONS:
            return _grouped(problem)
        run, launches = _operation(problem)
        return cost.priced(Plan(self.name, run, launches), problem)


def _is_small(p: Problem) -> bool:
    if "s" in p.wants or p.dropout or p.adapter_dtype is not p.dtype:
        return False
    if p.format != DENSE:  # PyTorch's autograd would keep W made dense
        return False
    if cost.gpu_of(p.device) is not None:
        return cost.host_bound(Aten.name, p)
    return p.M * p.K * p.N < SMALL


def _small(p: Problem) -> Plan:
    run: Run = operations.small_lora_linear
    calls = 3
    if _is_merged(p):
        run, calls = operations.merged_lora_linear, 2
    plan = Plan(
        Aten.name,
        run,
        (f"{calls} calls that PyTorch differentiates itself",),
        differentiable=True,
    )
    if not p.graph and cost.gpu_of(p.device) is not None:
        # Nobody needs a Function around its launches: the times decide.
        return cost.priced(plan, p)
    return replace(plan, ahead="a layer so small that the fewest calls are the fastest")


def _is_merged(p: Problem) -> bool:
    """Whether the update is added to W: on a CPU, where that was measured, to a plain tensor, which is
    known to take it; not where float32 products are rounded, which would round the update away."""
    if p.device.type != "cpu" or p.tf32:
        return False
    # A sum over more than K or N ranks would be rounded more coarsely than the reference's.
    low = p.r <= min(p.K, p.N)
    return p.plain and low and p.dtype.itemsize >= _EXACT and p.K * p.N * p.r <= _MERGED


def _grouped(p: Problem) -> Plan:
    if p.operation == "grouped_lora_linear":
        run = grouped.grouped_lora_linear(p.wants, operands.linear)
    else:
        run = grouped.grouped_lora_linear_backward(
            p.wants, p.adapter_dtype, operands.linear_transposed
        )
    return Plan(Aten.name, run, ("the base GEMM, and a batched product over all adapters",))


def _operation(p: Problem) -> tuple[Run, tuple[str, ...]]:
    if p.operation == "shrink":
        return operations.shrink, ("one product",)
    if p.operation == WEIGHT_NORM:
        return weight_norm, ("products of W, A and B with A, and sums of squares",)
    if p.operation == "bottleneck":
        return bottleneck.bottleneck(p), ("two products, the second onto the residual",)
    if p.operation == "bottleneck_backward":
        return bottleneck.bottleneck_backward(p), (f"{', '.join(p.wants)}: one call each",)
    if p.operation == "scaled_linear":
        return scaled_linear.forward(p, scaled_linear.times), ("the base GEMM, and a pass",)
    if p.operation == "scaled_linear_backward":
        run = scaled_linear.backward(p, scaled_linear.by_pytorch)
        return run, (f"{', '.join(p.wants)}: the base GEMM, a pass each, a sum",)
    if p.operation == "expand":
        return operations.expand(p.dtype), ("one product",)
    if p.operation == "expand_backward":
        run = operations.expand_backward(p.wants, p.adapter_dtype)
        return run, (f"{', '.join(p.wants)}: one call each",)
    if p.operation == "shrink_backward":
        return operations.shrink_backward(p.adapter_dtype), ("one product",)
    run = operations.linear_expand_transposed if p.transposed else operations.linear_expand
    if p.format != DENSE:
        return run, (f"the product of {p.format}, and the low-rank one",)
    return run, ("the low-rank product, then the base GEMM onto it",)
