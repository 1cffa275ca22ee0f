"""A whole layer's forward and backward, made of the operations: the one place that has the formula.

s = drop(x)·Aᵀ                      shrink
y = x·Wᵀ + scaling · s·Bᵀ + bias    linear_expand

ds = scaling · dy·B,  dB = scaling · dyᵀ·s,  dbias = Σ dy    expand_backward
dA = dsᵀ·drop(x)                                             shrink_backward
dx = dy·W + drop'(ds·A)                                      linear_expand, transposed
dweight = dyᵀ·x                                              PyTorch's product
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from lorafast.backends.plan import Plan, Refusal, Run
from lorafast.core.problem import Problem, parts

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""``dx``, ``dweight``, ``dA``, ``dB``, ``dbias``."""


def plan(problem: Problem, plan_of: Callable[[Problem], Plan]) -> Plan:
    """The plan of a layer's forward or backward that runs its operations one by one, each by what
    ``plan_of`` has for it."""
    plans = {part.operation: plan_of(part) for part in parts(problem)}
    runs = {operation: made.run for operation, made in plans.items()}
    if problem.operation == "lora_linear":
        run = forward(runs["shrink"], runs["linear_expand"])
    else:
        run = backward(runs, problem.wants)
    backends = list(dict.fromkeys(made.backend for made in plans.values()))
    seconds = [made.seconds for made in plans.values()]
    known = [s for s in seconds if s is not None]
    return Plan(
        " + ".join(backends) or "PyTorch",
        run,
        tuple(
            f"{operation} on {made.backend}: {line}"
            for operation, made in plans.items()
            for line in made.launches
        ),
        sum(known) if len(known) == len(seconds) else None,
        "its operations one by one",
        all(made.measured for made in plans.values()),
        next((made.ahead for made in plans.values() if made.ahead is not None), None),
    )


def plan_or_refusal(
    problem: Problem, plan_of: Callable[[Problem], Plan | Refusal]
) -> Plan | Refusal:
    """As ``plan``, by one backend, which may refuse one of the operations.

    Not ahead of anything: what is ahead of it is its operations, each by the best backend.
    """
    for part in parts(problem):
        answer = plan_of(part)
        if isinstance(answer, Refusal):
            return answer

    def must(part: Problem) -> Plan:
        answer = plan_of(part)
        assert isinstance(answer, Plan)
        return answer

    return replace(plan(problem, must), ahead=None)


def forward(shrink: Run, linear_expand: Run) -> Run:
    """``x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed`` → ``y, s``."""

    def run(
        x: Tensor,
        weight: Any,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        bias: Tensor | None,
        dropout_p: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        s = shrink(x, lora_A, dropout_p, seed)
        return linear_expand(x, weight, s, lora_B, scaling, bias, 0.0, None), s

    return run


def backward(runs: dict[str, Run], wants: tuple[str, ...]) -> Run:
    """``dy, x, weight, lora_A, lora_B, s, scaling, dropout_p, seed`` → ``Gradients``."""
    want_dx, want_dweight, want_dA = (name in wants for name in ("dx", "dweight", "dA"))
    expand_backward = runs.get("expand_backward")

    def run(
        dy: Tensor,
        x: Tensor | None,
        weight: Any,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        s: Tensor | None,
        scaling: float,
        dropout_p: float,
        seed: Tensor | None,
    ) -> Gradients:
        ds = dB = dbias = dA = dx = dweight = None
        if expand_backward is not None:
            ds, dB, dbias = expand_backward(dy, s, lora_B, scaling)
        if want_dA:
            dA = runs["shrink_backward"](ds, x, dropout_p, seed)
        if want_dx:
            assert lora_A is not None
            dx = runs["linear_expand"](dy, weight, ds, lora_A.t(), 1.0, None, dropout_p, seed)
        if want_dweight:
            assert x is not None
            dweight = dy.t() @ x
        return dx, dweight, dA, dB, dbias

    return run
