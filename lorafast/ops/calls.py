"""What calls are like: checked and planned once, then found again.

A call is found by all that its checks and its plan depend on. A layer's own tensors are read once
(``Memory``), not in every call.
"""

from collections.abc import Iterable

from torch import Tensor

from lorafast.backends import registry
from lorafast.backends.plan import Run
from lorafast.core.problem import PLAIN, Problem
from lorafast.core.sms import carveout
from lorafast.operands import Weight
from lorafast.ops import unstrided
from lorafast.ops.checks import check_lora_linear
from lorafast.ops.problems import as_rows, layer_problem


class Call:
    """What a call is like: checked, with the plan for it, and the plans for backwards that came."""

    __slots__ = (
        "backend", "backwards", "bias_shape", "differentiable", "elements", "inference", "matrix",
        "of_stored", "operand", "problem", "run",
    )  # fmt: skip

    def __init__(
        self, problem: Problem, backend: str | None, matrix: bool, operand: object
    ) -> None:
        plan = registry.choose(problem, backend)
        self.operand = operand
        self.problem = problem
        self.backend = backend
        self.matrix = matrix
        self.elements, self.bias_shape = problem.K * problem.N, (problem.N,)
        self.run = plan.run
        self.differentiable = plan.differentiable
        self.of_stored = plan.of_stored
        self.backwards: dict[object, Run] = {}
        self.inference: Call | None = None
        """The same call where no gradient is asked for, if that is served otherwise."""
        if plan.differentiable and problem.graph and problem.device.type != "cpu":
            other = Call(problem._replace(graph=False), backend, matrix, operand)
            self.inference = None if other.differentiable else other


class Memory:
    """Which tensors a layer had when it was called last, and what stands for their shapes, dtypes and
    devices: read once, not in every call.

    It holds addresses, not tensors, which others may want to free. Whoever changes tensors in place
    (``Module.to`` does) makes a new one; what is missed all the same costs a check, not a wrong result.
    """

    __slots__ = ("kept",)

    def __init__(self) -> None:
        self.kept: tuple[tuple[object, ...], Like | None] = ((), None)

    def keep(self, weight: Weight, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> "Like":
        """Reads the tensors."""
        if len(likes) >= _KEPT:
            likes.clear()
        like = likes.setdefault(like_of(weight, lora_A, lora_B, bias), Like())
        self.kept = ((id(weight), id(lora_A), id(lora_B), id(bias)), like)
        return like


class Like:
    """Stands for equal shapes, dtypes and devices of a layer's tensors; found by its address."""

    __slots__ = ()


_KEPT = 4096
likes: dict[tuple[object, ...], Like] = {}


def like_of(
    weight: Weight, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None
) -> tuple[object, ...]:
    """All of a layer's tensors that checks and plans depend on, for one on a CPU."""
    return (
        weight.shape, weight.dtype, weight.layout, weight.is_cpu, type(weight),
        lora_A.shape, lora_A.dtype, lora_A.layout, lora_A.is_cpu, type(lora_A),
        lora_B.shape, lora_B.dtype, lora_B.layout, lora_B.is_cpu, type(lora_B),
        bias if bias is None else (bias.shape, bias.dtype, bias.is_cpu, type(bias)),
    )  # fmt: skip


calls: dict[tuple[object, ...], Call] = {}
registry.when_forgotten(calls.clear)


def layouts_matter(x: Tensor, backend: str | None) -> bool:
    """Whether plans depend on how matrices lie in memory: not on a CPU, unless one is forced."""
    return not x.is_cpu or backend is not None


def where(matrices: Iterable[Tensor]) -> tuple[object, ...]:
    """What the layouts of matrices are made of, and their devices with the SMs that are left free."""
    return carveout(), *[
        (t.stride(), t.data_ptr() & 15 if type(t) in PLAIN else 0, t.device) for t in matrices
    ]


def first_call(
    key: tuple[object, ...] | None,
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    backend: str | None,
) -> Call | None:
    """Checks a call and plans it; None if the rows of ``x`` are none that kernels can read."""
    has_rows = check_lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p)
    if not has_rows or unstrided.is_sharded(x):
        return None
    layouts = layouts_matter(x, backend)
    dropout = bool(dropout_p)
    problem = layer_problem(as_rows(x), weight, lora_A, lora_B, bias, dropout, ("y",), layouts)
    operand = None if isinstance(weight, Tensor) else weight.layout
    before = registry.times_forgotten()
    call = Call(problem, backend, x.dim() == 2, operand)
    if key is not None and before == registry.times_forgotten():
        if len(calls) >= _KEPT:
            calls.clear()
        calls[key] = call
    return call
