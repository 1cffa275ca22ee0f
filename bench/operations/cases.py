"""The operations of a LoRA layer as calls on a problem's tensors, with their arithmetic and bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lorafast.bench.common.problem import DTYPES, SCALING, Problem, Tensors
from torch import Tensor

from lorafast.core.problem import WANTS
from lorafast.core.problem import Problem as Call
from lorafast.ops import problems
from lorafast.reference import wide

Cast = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """``call(operations, cast)`` runs one operation on tensors passed through ``cast``, as the
    numerical contract has it; ``flops`` and ``least_bytes`` (each operand once) are those of a call.

    ``asks`` describes the call to backends.
    """

    name: str
    operation: str
    call: Callable[[Any, Cast], Tensor | tuple[Tensor, ...]]
    flops: float
    least_bytes: int
    asks: Call


def cases(problem: Problem, tensors: Tensors) -> dict[str, Case]:
    """The operations in the order of a forward and backward; ``dx`` is ``linear_expand`` once more, and
    a whole layer's forward and backward are those of their parts where a backend has no more."""
    M, K, N, r = problem.shape.M, problem.shape.K, problem.shape.N, problem.r
    size, adapter_size = problem.element_size, DTYPES[problem.adapter_dtype].itemsize
    adapter, p = DTYPES[problem.adapter_dtype], problem.dropout_p
    x, dy, weight, bias = tensors.x[0], tensors.dy[0], tensors.weight, tensors.bias
    lora_A, lora_B = tensors.lora_A, tensors.lora_B
    seed = torch.tensor([2023], device=x.device) if p else None
    low = wide(x.dtype)
    s = torch.nn.functional.linear(x.to(low), lora_A.to(low))
    ds = SCALING * (dy.to(low) @ lora_B.to(low))

    def base(run: Any, cast: Cast) -> Tensor:
        result: Tensor = run.linear_expand(
            cast(x), cast(weight), cast(s, low), cast(lora_B, adapter), SCALING,
            None if bias is None else cast(bias),
        )  # fmt: skip
        return result

    def dx(run: Any, cast: Cast) -> Tensor:
        result: Tensor = run.linear_expand(
            cast(dy),
            cast(weight),
            cast(ds, low),
            cast(lora_A, adapter).t(),
            1.0,
            None,
            p,
            seed,
            transposed=True,
        )
        return result

    def forward(run: Any, cast: Cast) -> tuple[Tensor, ...]:
        arguments = (cast(x), cast(weight), cast(lora_A, adapter), cast(lora_B, adapter), SCALING)
        biased = None if bias is None else cast(bias)
        if hasattr(run, "lora_linear_backward"):
            y, s = run.lora_linear(*arguments, biased, p, seed)
        else:
            s = run.shrink(arguments[0], arguments[2], p, seed)
            y = run.linear_expand(*arguments[:2], s, arguments[3], SCALING, biased)
        return y, s

    def backward(run: Any, cast: Cast) -> tuple[Tensor, ...]:
        A, B = cast(lora_A, adapter), cast(lora_B, adapter)
        given = (cast(dy), cast(x), cast(weight), A, B, cast(s, low), SCALING, p, seed)
        if hasattr(run, "lora_linear_backward"):
            found: tuple[Tensor, ...] = run.lora_linear_backward(*given)
            return found[:3]  # no dbias was asked for
        ds, dB, *_ = run.expand_backward(given[0], given[5], B, SCALING)
        dA = run.shrink_backward(ds, given[1], p, seed, A.dtype)
        dx = run.linear_expand(given[0], given[2], ds, A.t(), 1.0, None, p, seed, transposed=True)
        return dx, dA, dB

    layer = problems.layer_problem(
        x, weight, lora_A, lora_B, bias, p > 0.0, WANTS["lora_linear"], layouts=True
    )
    backward_of_it = problems.backward_problem(layer, problems.FROZEN, dy, layouts=True)
    product = 2.0 * M * K * N
    thin = 2.0 * M * r
    adapters = r * (K + N) * adapter_size
    both = (M * K + K * N + M * N) * size
    of_s = M * r * low.itemsize
    found = (
        Case(
            "shrink", "shrink",
            lambda run, cast: run.shrink(cast(x), cast(lora_A, adapter), p, seed),
            2.0 * M * K * r, M * K * size + of_s + r * K * adapter_size,
            problems.shrink_problem(x, lora_A, p, seed),
        ),
        Case(
            "expand", "expand",
            lambda run, cast: run.expand(
                cast(s, low), cast(lora_B, adapter), SCALING, p, seed, dtype=cast(dy).dtype
            ),
            2.0 * M * N * r, M * N * size + of_s + N * r * adapter_size,
            problems.expand_problem(s, lora_B, p, seed, dy.dtype),
        ),
        Case(
            "linear_expand", "linear_expand", base, product + 2.0 * M * N * r,
            both + of_s + N * r * adapter_size + (0 if bias is None else N * size),
            problems.linear_expand_problem(x, weight, s, lora_B, bias, 0.0, None, False),
        ),
        Case(
            "expand_backward", "expand_backward",
            lambda run, cast: run.expand_backward(
                cast(dy), cast(s, low), cast(lora_B, adapter), SCALING
            )[:2],
            4.0 * M * N * r, M * N * size + 2 * of_s + 2 * N * r * adapter_size,
            problems.expand_backward_problem(dy, s, lora_B, ("ds", "dB"), adapter),
        ),
        Case(
            "shrink_backward", "shrink_backward",
            lambda run, cast: run.shrink_backward(
                cast(ds, low), cast(x), p, seed, cast(lora_A, adapter).dtype
            ),
            2.0 * M * K * r, M * K * size + of_s + r * K * adapter_size,
            problems.shrink_backward_problem(ds, x, p, seed, adapter),
        ),
        Case(
            "dx", "linear_expand", dx, product + 2.0 * M * K * r,
            both + of_s + r * K * adapter_size,
            problems.linear_expand_problem(dy, weight, ds, lora_A.t(), None, p, seed, True),
        ),
        Case(
            "lora_linear", "lora_linear", forward, product + thin * (K + N),
            both + of_s + adapters + (0 if bias is None else N * size),
            layer,
        ),
        Case(
            "lora_linear_backward", "lora_linear_backward", backward,
            product + 2 * thin * (K + N), both + M * K * size + of_s + 2 * adapters,
            backward_of_it,
        ),
    )  # fmt: skip
    return {case.name: case for case in found}


CASES = (
    "shrink", "expand", "linear_expand", "expand_backward", "shrink_backward", "dx", "lora_linear",
    "lora_linear_backward",
)  # fmt: skip
