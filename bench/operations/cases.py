"""The operations of a LoRA layer as calls on a problem's tensors, with their arithmetic and bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lorafast.bench.common.problem import DTYPES, SCALING, Problem, Tensors
from torch import Tensor

Cast = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """``call(operations, cast)`` runs one operation on tensors passed through ``cast``, as the
    numerical contract has it; ``flops`` and ``least_bytes`` (each operand once) are those of a call."""

    name: str
    operation: str
    call: Callable[[Any, Cast], Tensor | tuple[Tensor, ...]]
    flops: float
    least_bytes: int


def cases(problem: Problem, tensors: Tensors) -> dict[str, Case]:
    """The operations in the order of a forward and backward; ``dx`` is ``linear_expand`` once more."""
    M, K, N, r = problem.shape.M, problem.shape.K, problem.shape.N, problem.r
    size, adapter_size = problem.element_size, DTYPES[problem.adapter_dtype].itemsize
    adapter, p = DTYPES[problem.adapter_dtype], problem.dropout_p
    x, dy, weight, bias = tensors.x[0], tensors.dy[0], tensors.weight, tensors.bias
    lora_A, lora_B = tensors.lora_A, tensors.lora_B
    seed = torch.tensor([2023], device=x.device) if p else None
    s = torch.nn.functional.linear(x, lora_A.to(x.dtype))
    ds = SCALING * (dy @ lora_B.to(x.dtype))

    def base(run: Any, cast: Cast) -> Tensor:
        result: Tensor = run.linear_expand(
            cast(x), cast(weight), cast(s), cast(lora_B, adapter), SCALING,
            None if bias is None else cast(bias),
        )  # fmt: skip
        return result

    def dx(run: Any, cast: Cast) -> Tensor:
        result: Tensor = run.linear_expand(
            cast(dy), cast(weight).t(), cast(ds), cast(lora_A, adapter).t(), 1.0, None, p, seed
        )
        return result

    product = 2.0 * M * K * N
    both = (M * K + K * N + M * N) * size
    found = (
        Case(
            "shrink", "shrink",
            lambda run, cast: run.shrink(cast(x), cast(lora_A, adapter), p, seed),
            2.0 * M * K * r, (M * K + M * r) * size + r * K * adapter_size,
        ),
        Case(
            "linear_expand", "linear_expand", base, product + 2.0 * M * N * r,
            both + M * r * size + N * r * adapter_size + (0 if bias is None else N * size),
        ),
        Case(
            "expand_backward", "expand_backward",
            lambda run, cast: run.expand_backward(
                cast(dy), cast(s), cast(lora_B, adapter), SCALING
            ),
            4.0 * M * N * r, (M * N + 2 * M * r) * size + 2 * N * r * adapter_size,
        ),
        Case(
            "shrink_backward", "shrink_backward",
            lambda run, cast: run.shrink_backward(
                cast(ds), cast(x), p, seed, cast(lora_A, adapter).dtype
            ),
            2.0 * M * K * r, (M * K + M * r) * size + r * K * adapter_size,
        ),
        Case(
            "dx", "linear_expand", dx, product + 2.0 * M * K * r,
            both + M * r * size + r * K * adapter_size,
        ),
    )  # fmt: skip
    return {case.name: case for case in found}


CASES = ("shrink", "linear_expand", "expand_backward", "shrink_backward", "dx")
