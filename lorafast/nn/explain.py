"""``explain``: the plan of a module's layers, and why not another backend."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafast import operands
from lorafast.backends import BackendError, Plan, Refusal, forced, registry
from lorafast.core.problem import Layout, Problem
from lorafast.nn import offload
from lorafast.nn.lora_linear import LoRALinear
from lorafast.ops.problems import backward_problem, layer_problem


@dataclass(frozen=True)
class Choice:
    """What serves an operation: its backend (None if none does), the reason, what it launches, and the
    reasons against the others."""

    operation: str
    backend: str | None
    reason: str
    launches: tuple[str, ...]
    others: dict[str, str]


@dataclass(frozen=True)
class Explanation:
    """The choices for each adapted layer; prints as text, equal layers together."""

    layers: dict[str, tuple[Choice, ...]]

    def __str__(self) -> str:
        groups: dict[str, list[str]] = {}
        for name, choices in self.layers.items():
            groups.setdefault(_describe_all(choices), []).append(name)
        return "\n".join(f"{_names(names)}\n{description}" for description, names in groups.items())

    __repr__ = __str__


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _describe_all(choices: tuple[Choice, ...]) -> str:
    return "\n".join(f"  {choice.operation}: {_describe(choice)}" for choice in choices)


def _describe(choice: Choice) -> str:
    lines = [f"{choice.backend or 'none'} ({choice.reason})"]
    lines += [f"    {launch}" for launch in choice.launches]
    lines += [f"    not {name}: {reason}" for name, reason in choice.others.items()]
    return "\n".join(lines)


def explain(module: nn.Module, x: Tensor | None = None) -> Explanation:
    """Which backend serves each ``LoRALinear`` in ``module``, what it launches, and why not others.

    It speaks of an eager training step with gradients of x, A and B: ``lora_linear`` is the forward,
    ``lora_linear_backward`` the backward.

    ``x`` is an input such as a layer would get; only its device, dtype and number of rows count.
    Without it the weight's are assumed, and many rows.

    Raises:
        ValueError: ``module`` has no ``LoRALinear``.
    """
    layers = {}
    for name, layer in module.named_modules():
        if isinstance(layer, LoRALinear):
            with offload.present(layer):
                layers[name or "(module)"] = _choices(layer, x)
    if not layers:
        raise ValueError(
            "the module has no LoRALinear, whose backends could be explained: lorafast.adapt(model) "
            "makes them (a model with PEFT's adapters needs none: lorafast.accelerate(model))"
        )
    return Explanation(layers)


_MANY_ROWS = 1 << 20


def _choices(layer: LoRALinear, x: Tensor | None) -> tuple[Choice, ...]:
    forward, backward = _problems(layer, x)
    if layer.merged:
        merged = "the layer is merged: a plain product"
        return tuple(Choice(p.operation, None, merged, (), {}) for p in (forward, backward))
    chosen = _choose(forward)
    if chosen is not None and chosen.differentiable:
        second = Choice(
            backward.operation, chosen.backend, "PyTorch differentiates the forward", (), {}
        )
    else:
        second = _choice(backward, _choose(backward))
    return _choice(forward, chosen, _packed(layer, forward)), second


def _choose(problem: Problem) -> Plan | None:
    try:
        return registry.choose(problem, forced.forced())
    except BackendError:
        return None


def _choice(problem: Problem, plan: Plan | None, remark: str = "") -> Choice:
    name = forced.forced()
    answers = {other: registry.plan_of(other, problem) for other in registry.names()}
    if plan is None:
        assert name is not None
        refusal = registry.plan_of(name, problem)
        assert not isinstance(refusal, Plan)
        reason = f"{name} is forced and can't: {refusal.reason}"
        return Choice(problem.operation, None, reason, (), _others(answers, ""))
    reason = "forced" if name is not None else plan.ahead or _time(plan)
    others = _others(answers, plan.backend)
    return Choice(problem.operation, plan.backend, reason + remark, plan.launches, others)


def _others(answers: dict[str, Plan | Refusal], serving: str) -> dict[str, str]:
    name = forced.forced()
    return {
        other: _against(answer, name)
        for other, answer in answers.items()
        if other not in serving.split(" + ") and other != name
    }


def _time(plan: Plan) -> str:
    if plan.seconds is None:
        return "no measurement on this device shows another backend ahead of it"
    return f"{plan.seconds * 1e6:,.0f} µs" + (f", {plan.source}" if plan.source else "")


def _against(answer: Plan | Refusal, forced_name: str | None) -> str:
    if isinstance(answer, Refusal):
        return answer.reason
    if forced_name is not None:
        return "usable, another was forced"
    if answer.ahead is not None:
        return f"ahead by a rule ({answer.ahead}), but registered before"
    return "usable, not measured to be faster" if answer.seconds is None else _time(answer)


def _packed(layer: LoRALinear, problem: Problem) -> str:
    if problem.device.type != "cpu":
        return ""
    is_packed = operands.is_packed(layer.operand(), problem.dtype)
    return ", on the packed weight" if is_packed else ""


def _problems(layer: LoRALinear, x: Tensor | None) -> tuple[Problem, Problem]:
    """The layer's forward and backward, on rows like those of ``x``."""
    weight = layer.operand()
    like = operands.stored(weight)[0] if x is None else x
    dtype = weight.dtype if x is None else x.dtype
    M = _MANY_ROWS if x is None else x.numel() // max(x.shape[-1], 1)

    def rows(size: int) -> Tensor:  # one in memory
        return torch.empty((1, size), dtype=dtype, device=like.device).expand(M, size)

    dropout = bool(layer.dropout and layer.training)
    forward = layer_problem(
        rows(layer.in_features), weight, layer.lora_A, layer.lora_B, layer.bias, dropout, ("y",),
        layouts=True,
    )  # fmt: skip
    fresh = Layout.fresh(M, layer.in_features, dtype)
    forward = forward._replace(layouts=forward.layouts._replace(x=fresh))
    backward = backward_problem(forward, ("dx", "dA", "dB"), rows(layer.out_features), layouts=True)
    fresh = Layout.fresh(M, layer.out_features, dtype)
    return forward, backward._replace(layouts=backward.layouts._replace(dy=fresh))
