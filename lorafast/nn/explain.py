"""``explain``: the plan of a module's layers, and why not another backend."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lorafast import operands
from lorafast.backends import BackendError, Plan, Refusal, forced, registry
from lorafast.core.problem import Problem
from lorafast.nn import offload, siblings
from lorafast.nn.adapter_layer import AdapterLayer
from lorafast.nn.adapter_module import AdapterModule, adapters_in
from lorafast.nn.lora_linear import LoRALinear
from lorafast.nn.problems import shared_problems, why_not_shared
from lorafast.ops.weight_norm import plan_of

_OTHERWISE = ", where a call shares x with no sibling"


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
class Sharing:
    """Layers that a module calls with the same x (``adapt(..., fuse="siblings")``): what serves them
    together, and for which of them that is not so, with the reason."""

    layers: tuple[str, ...]
    choices: tuple[Choice, ...]
    alone: dict[str, str]

    def __str__(self) -> str:
        names = dict(zip(self.layers, siblings.short(self.layers), strict=True))
        together = [names[name] for name in self.layers if name not in self.alone]
        lines = [f"  {names[name]} by itself: {reason}" for name, reason in self.alone.items()]
        if self.choices:
            lines.insert(0, f"  together: {', '.join(together)}")
            lines.append(_describe_all(self.choices))
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """The choices for each adapted layer, and for those that share x; prints as text, equal layers
    together."""

    layers: dict[str, tuple[Choice, ...]]
    sharing: tuple[Sharing, ...] = ()

    def __str__(self) -> str:
        shared = _alike((f"{', '.join(one.layers)} share x", str(one)) for one in self.sharing)
        layers = _alike((name, _describe_all(choices)) for name, choices in self.layers.items())
        return "\n".join(
            f"{_names(names)}\n{description}"
            for found in (shared, layers)
            for description, names in found.items()
        )

    __repr__ = __str__


def _alike(described: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names by what is said of them."""
    found: dict[str, list[str]] = {}
    for name, description in described:
        found.setdefault(description, []).append(name)
    return found


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
    """Which backend serves each adapter in ``module``, what it launches, and why not others.

    It speaks of an eager training step with gradients of x and the adapter: ``lora_linear`` is the
    forward, ``lora_linear_backward`` the backward, and of a bottleneck ``bottleneck`` and
    ``bottleneck_backward``. Under ``torch.no_grad`` the forward is that of inference. What
    PyTorch's own calls serve has no backend. Of layers that share x it says what serves them together:
    one ``shrink`` and one ``shrink_backward`` of all their ranks, a ``linear_expand`` and an
    ``expand_backward`` for each, and dx in one buffer; and what serves a call of each that shares
    nothing.

    ``x`` is an input such as a layer would get; only its device, dtype and number of rows count.
    Without it the weight's are assumed, and many rows.

    Raises:
        ValueError: ``module`` has no adapter.
    """
    adapted = adapters_in(module)
    layers = {}
    for name, layer in adapted.items():
        with offload.present(layer), _part_of(layer):
            layers[name or "(module)"] = _choices(layer, x)
    may_share = {n: one for n, one in adapted.items() if isinstance(one, AdapterLayer)}
    sharing = tuple(_sharing(group, x) for group in siblings.groups(may_share))
    for one in sharing:
        for name in one.layers:
            if name not in one.alone:
                layers[name] = tuple(
                    replace(choice, reason=choice.reason + _OTHERWISE) for choice in layers[name]
                )
    if not layers:
        raise ValueError(
            "the module has no LoRALinear or other adapted layer to explain: lorafast.adapt(model) "
            "makes them (a model with PEFT's adapters needs none: lorafast.accelerate(model))"
        )
    return Explanation(layers, sharing)


def _part_of(layer: AdapterModule) -> contextlib.AbstractContextManager[None]:
    """Within the block the layer is what this rank computes of it."""
    if layer._local is None:
        return contextlib.nullcontext()
    shown: contextlib.AbstractContextManager[None] = layer._local.shown(layer)
    return shown


def _sharing(group: Mapping[str, Any], x: Tensor | None) -> Sharing:
    alone = why_not_shared(group, x)
    together = [layer for name, layer in group.items() if name not in alone]
    problems = shared_problems(together, x) if together else ()
    choices = [_choice(problem, _choose(problem)) for problem in problems]
    return Sharing(tuple(group), tuple(_without_repeats(choices)), alone)


def _without_repeats(choices: Sequence[Choice]) -> list[Choice]:
    """Siblings of one shape have one choice."""
    return [one for i, one in enumerate(choices) if one not in choices[:i]]


def _choices(layer: AdapterModule, x: Tensor | None) -> tuple[Choice, ...]:
    problems = layer.problems(x)
    if layer.merged:
        merged = "the layer is merged: a plain one's call"
        named = [_named(one.operation, layer.parts[i // 2]) for i, one in enumerate(problems)]
        return tuple(Choice(name, None, merged, (), {}) for name in named or [layer.operation])
    if not problems:
        return (Choice(layer.operation, None, layer.served_by, (), {}),)
    pairs = zip(layer.parts, problems[::2], problems[1::2], strict=True)
    return tuple(
        replace(choice, operation=_named(choice.operation, part))
        for part, *pair in pairs
        for choice in _both(layer, *pair)
    )


def _named(operation: str, part: str) -> str:
    return f"{operation} of {part}" if part else operation


def _both(layer: AdapterModule, forward: Problem, backward: Problem) -> tuple[Choice, Choice]:
    chosen = _choose(forward)
    if chosen is not None and chosen.differentiable:
        second = Choice(
            backward.operation, chosen.backend, "PyTorch differentiates the forward", (), {}
        )
    else:
        second = _choice(backward, _choose(backward))
    remark = _packed(layer, forward)
    if isinstance(layer, LoRALinear) and layer.use_dora:
        remark += f", within DoRA, whose norm is computed by {_norm(layer)}"
    return _choice(forward, chosen, remark), second


def _norm(layer: LoRALinear) -> str:
    try:
        plan = plan_of(layer.operand(), layer.lora_A, layer.lora_B)
    except BackendError as error:
        return f"none: {error}"
    return f"{plan.backend} ({', '.join(plan.launches)})"


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


def _packed(layer: AdapterModule, problem: Problem) -> str:
    if problem.device.type != "cpu" or not isinstance(layer, LoRALinear):
        return ""
    is_packed = operands.is_packed(layer.operand(), problem.dtype)
    return ", on the packed weight" if is_packed else ""
