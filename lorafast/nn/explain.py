"""``explain``: which backend serves a module's operations, and why not the others."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafast.nn import offload
from lorafast.nn.lora_linear import LoRALinear
from lorafast.operands import packed
from lorafast.ops import dispatch
from lorafast.ops.lora_linear import is_small


@dataclass(frozen=True)
class Choice:
    """The backend of one operation, the reason for it, and the reasons against the others."""

    operation: str
    backend: str | None
    reason: str
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
    groups: dict[str, list[str]] = {}
    for choice in choices:
        groups.setdefault(_describe(choice), []).append(choice.operation)
    return "\n".join(f"  {', '.join(ops)}: {text}" for text, ops in groups.items())


def _describe(choice: Choice) -> str:
    lines = [f"{choice.backend or 'none'} ({choice.reason})"]
    lines += [f"    not {name}: {reason}" for name, reason in choice.others.items()]
    return "\n".join(lines)


def explain(module: nn.Module, x: Tensor | None = None) -> Explanation:
    """Which backend serves each operation of each ``LoRALinear`` in ``module``, and why not others.

    It speaks of an eager training step with gradients of x, A and B; compiled code, and a backward that
    needs fewer gradients, choose operation by operation.

    ``x`` is an input such as a layer would get; only its device, dtype and number of rows count.
    Without it the weight's are assumed, and many rows.

    Raises:
        ValueError: ``module`` has no ``LoRALinear``.
    """
    layers = {}
    for name, layer in module.named_modules():
        if isinstance(layer, LoRALinear):
            with offload.present(layer):
                layers[name or "(module)"] = tuple(
                    _choose(operation, layer, x) for operation in dispatch.OPERATIONS
                )
    if not layers:
        raise ValueError(
            "the module has no LoRALinear, whose backends could be explained: lorafast.adapt(model) "
            "makes them (a model with PEFT's adapters needs none: lorafast.accelerate(model))"
        )
    return Explanation(layers)


def _choose(operation: str, layer: LoRALinear, x: Tensor | None) -> Choice:
    like = layer.weight if x is None else x
    M = _MANY_ROWS if x is None else x.numel() // max(x.shape[-1], 1)
    tensors = _sample(operation, layer, like, M)
    reasons = {
        name: dispatch.why_not(name, operation, tensors) for name in dispatch.backend_names()
    }
    forced = dispatch.forced()
    if layer.merged:
        return Choice(operation, None, "the layer is merged: a plain product", {})
    if forced is None:
        backend, reason = _automatically(operation, layer, tensors, like, M)
    elif reasons[forced] is None:
        backend, reason = forced, "forced"
    else:
        backend, reason = None, f"{forced} is forced and can't: {reasons[forced]}"
    weight = layer._parameters.get("weight")
    if (
        operation == "linear_expand"
        and backend in ("aten", "cpu")
        and weight is not None
        and weight.dtype is like.dtype
        and packed.is_packed(weight)
    ):
        reason += ", on the packed weight"
    usable = "usable, another was forced" if forced else "usable, not measured to be faster"
    others = {name: why or usable for name, why in reasons.items() if name not in (backend, forced)}
    return Choice(operation, backend, reason, others)


def _automatically(
    operation: str, layer: LoRALinear, tensors: tuple[Tensor, ...], like: Tensor, M: int
) -> tuple[str, str]:
    """As a training step of the eager layer chooses, with gradients of x, A and B."""
    dropout_p = layer.dropout if layer.training else 0.0
    x, lora_A, *seed = _sample("shrink", layer, like, M)
    if is_small(x, lora_A, layer.out_features, dropout_p, None):
        return "aten", "a layer so small that the fewest calls are the fastest"
    dy, s, lora_B = _sample("expand_backward", layer, like, M)
    forward = operation in ("shrink", "linear_expand")
    whole = "lora_linear" if forward else "lora_linear_backward"
    W = layer.base_weight()
    others = (W, lora_B) if forward else (dy, W, lora_B, s)
    backend, reason = dispatch.automatic_whole(whole, x, lora_A, seed[0] if seed else None, *others)
    if backend is not None:
        return backend, reason
    return dispatch.automatic_choice(operation, *tensors)


_MANY_ROWS = 1 << 20


def _sample(operation: str, layer: LoRALinear, like: Tensor, M: int) -> tuple[Tensor, ...]:
    """Tensors as the operation gets them in this layer, one row in memory; a mask comes with a seed."""

    def rows(size: int) -> Tensor:
        return torch.empty((1, size), dtype=like.dtype, device=like.device).expand(M, size)

    x, dy, s = rows(layer.in_features), rows(layer.out_features), rows(layer.r)
    masked = layer.dropout and layer.training
    seed = (torch.zeros(1, dtype=torch.int64, device=like.device),) if masked else ()
    return {
        "shrink": (x, layer.lora_A, *seed),
        "linear_expand": (x, layer.base_weight(), s, layer.lora_B),
        "expand_backward": (dy, s, layer.lora_B),
        "shrink_backward": (s, x, *seed),
    }[operation]
