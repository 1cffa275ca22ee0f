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


CASES = (
    "shrink", "expand", "linear_expand", "expand_backward", "shrink_backward", "dx", "lora_linear",
    "lora_linear_backward",
)  # fmt: skip
"""In the order of a forward and backward; ``dx`` is ``linear_expand`` once more, and a whole layer's
forward and backward are those of their parts where a backend has no more."""


def cases(problem: Problem, tensors: Tensors) -> dict[str, Case]:
    """Those of ``CASES`` on the first of the problem's batches, by name."""
    drawn = _Drawn(problem, tensors)
    work, asks = _work(problem), drawn.asks()
    return {
        name: Case(name, asks[name].operation, getattr(drawn, name), *work[name], asks[name])
        for name in CASES
    }


def _work(problem: Problem) -> dict[str, tuple[float, int]]:
    """``flops`` and ``least_bytes`` of each case."""
    M, K, N, r = problem.shape.M, problem.shape.K, problem.shape.N, problem.r
    size, adapter_size = problem.element_size, DTYPES[problem.adapter_dtype].itemsize
    gemm, skinny = 2.0 * M * K * N, 2.0 * M * r
    x, y = M * K * size, M * N * size
    both = x + K * N * size + y
    s = M * r * wide(DTYPES[problem.dtype]).itemsize
    A, B = r * K * adapter_size, r * N * adapter_size
    bias = N * size if problem.shape.bias else 0
    return {
        "shrink": (skinny * K, x + s + A),
        "expand": (skinny * N, y + s + B),
        "linear_expand": (gemm + skinny * N, both + s + B + bias),
        "expand_backward": (2 * skinny * N, y + 2 * s + 2 * B),
        "shrink_backward": (skinny * K, x + s + A),
        "dx": (gemm + skinny * K, both + s + A),
        "lora_linear": (gemm + skinny * (K + N), both + s + A + B + bias),
        "lora_linear_backward": (gemm + 2 * skinny * (K + N), both + x + s + 2 * (A + B)),
    }


class _Drawn:
    """The tensors of the calls; a method for each case, of its name."""

    def __init__(self, problem: Problem, tensors: Tensors) -> None:
        self.x, self.dy = tensors.x[0], tensors.dy[0]
        self.weight, self.bias = tensors.weight, tensors.bias
        self.lora_A, self.lora_B = tensors.lora_A, tensors.lora_B
        self.p, self.adapter = problem.dropout_p, DTYPES[problem.adapter_dtype]
        self.seed = torch.tensor([2023], device=self.x.device) if self.p else None
        low = self.low = wide(self.x.dtype)
        self.s = torch.nn.functional.linear(self.x.to(low), self.lora_A.to(low))
        self.ds = SCALING * (self.dy.to(low) @ self.lora_B.to(low))

    def shrink(self, run: Any, cast: Cast) -> Tensor:
        s: Tensor = run.shrink(cast(self.x), cast(self.lora_A, self.adapter), self.p, self.seed)
        return s

    def expand(self, run: Any, cast: Cast) -> Tensor:
        y: Tensor = run.expand(
            cast(self.s, self.low), cast(self.lora_B, self.adapter), SCALING, self.p, self.seed,
            dtype=cast(self.dy).dtype,
        )  # fmt: skip
        return y

    def linear_expand(self, run: Any, cast: Cast) -> Tensor:
        y: Tensor = run.linear_expand(
            cast(self.x), cast(self.weight), cast(self.s, self.low),
            cast(self.lora_B, self.adapter), SCALING, self._cast_bias(cast),
        )  # fmt: skip
        return y

    def expand_backward(self, run: Any, cast: Cast) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = run.expand_backward(
            cast(self.dy), cast(self.s, self.low), cast(self.lora_B, self.adapter), SCALING
        )
        return found[:2]

    def shrink_backward(self, run: Any, cast: Cast) -> Tensor:
        dtype = cast(self.lora_A, self.adapter).dtype
        dA: Tensor = run.shrink_backward(
            cast(self.ds, self.low), cast(self.x), self.p, self.seed, dtype
        )
        return dA

    def dx(self, run: Any, cast: Cast) -> Tensor:
        A_t = cast(self.lora_A, self.adapter).t()
        dx: Tensor = run.linear_expand(
            cast(self.dy), cast(self.weight), cast(self.ds, self.low), A_t, 1.0, None, self.p,
            self.seed, transposed=True,
        )  # fmt: skip
        return dx

    def lora_linear(self, run: Any, cast: Cast) -> tuple[Tensor, ...]:
        x, weight, bias = cast(self.x), cast(self.weight), self._cast_bias(cast)
        A, B = cast(self.lora_A, self.adapter), cast(self.lora_B, self.adapter)
        if hasattr(run, "lora_linear_backward"):
            y, s = run.lora_linear(x, weight, A, B, SCALING, bias, self.p, self.seed)
        else:
            s = run.shrink(x, A, self.p, self.seed)
            y = run.linear_expand(x, weight, s, B, SCALING, bias)
        return y, s

    def lora_linear_backward(self, run: Any, cast: Cast) -> tuple[Tensor, ...]:
        A, B = cast(self.lora_A, self.adapter), cast(self.lora_B, self.adapter)
        dy, x, weight, s = cast(self.dy), cast(self.x), cast(self.weight), cast(self.s, self.low)
        mask = self.p, self.seed
        if hasattr(run, "lora_linear_backward"):
            found: tuple[Tensor, ...] = run.lora_linear_backward(
                dy, x, weight, A, B, s, SCALING, *mask
            )
            return found[:3]  # no dbias was asked for
        ds, dB, *_ = run.expand_backward(dy, s, B, SCALING)
        dA = run.shrink_backward(ds, x, *mask, A.dtype)
        dx = run.linear_expand(dy, weight, ds, A.t(), 1.0, None, *mask, transposed=True)
        return dx, dA, dB

    def asks(self) -> dict[str, Call]:
        """Each case, described to backends."""
        x, dy, weight, bias, s, ds = self.x, self.dy, self.weight, self.bias, self.s, self.ds
        lora_A, lora_B, p, seed = self.lora_A, self.lora_B, self.p, self.seed
        layer = problems.layer_problem(
            x, weight, lora_A, lora_B, bias, p > 0.0, WANTS["lora_linear"], layouts=True
        )
        return {
            "shrink": problems.shrink_problem(x, lora_A, p, seed),
            "expand": problems.expand_problem(s, lora_B, p, seed, dy.dtype),
            "linear_expand": problems.linear_expand_problem(
                x, weight, s, lora_B, bias, 0.0, None, False
            ),
            "expand_backward": problems.expand_backward_problem(
                dy, s, lora_B, ("ds", "dB"), self.adapter
            ),
            "shrink_backward": problems.shrink_backward_problem(ds, x, p, seed, self.adapter),
            "dx": problems.linear_expand_problem(
                dy, weight, ds, lora_A.t(), None, p, seed, True
            ),
            "lora_linear": layer,
            "lora_linear_backward": problems.backward_problem(
                layer, problems.FROZEN, dy, layouts=True
            ),
        }  # fmt: skip

    def _cast_bias(self, cast: Cast) -> Tensor | None:
        return None if self.bias is None else cast(self.bias)
