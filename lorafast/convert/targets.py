"""Which layers of a model to adapt, by the rules of PEFT's ``target_modules``."""

import difflib
import re
import warnings
from collections.abc import Iterable

from torch import nn

from lorafast.nn import LoRALinear
from lorafast.nn.lora_linear import why_not_adaptable

ALL_LINEAR = "all-linear"
Pattern = str | Iterable[str]


def matches(pattern: Pattern, name: str) -> bool:
    """A string is a regex over the whole name; of several names each is it or a suffix of it."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in pattern)


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The output head of a Transformers model, which ``all-linear`` leaves out as PEFT does."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def why_not_here(name: str, module: nn.Module, model: nn.Module) -> str | None:
    """The reason for which the layer can't be adapted at its place in the model, or None."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight without calling it"
    return why_not_adaptable(module)


def find(model: nn.Module, targets: Pattern, exclude: Pattern | None) -> dict[str, nn.Linear]:
    """The layers to adapt by name, also those reached by two names.

    Raises:
        ValueError: nothing matches, or one of several names matches nothing.
        TypeError: a layer that was asked for can't be adapted.
    """
    linears = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and not (exclude is not None and matches(exclude, name))
    }
    if targets == ALL_LINEAR:
        return _all_linear(model, linears)
    if isinstance(targets, str):
        wanted: tuple[Pattern, ...] = (targets,)
    else:
        wanted = tuple((target,) for target in targets)
    found: dict[str, nn.Linear] = {}
    for pattern in wanted:
        hits = {name: linear for name, linear in linears.items() if matches(pattern, name)}
        if not hits:
            raise ValueError(_nothing_matches(pattern, model, linears))
        found |= hits
    for name, linear in found.items():
        reason = why_not_here(name, linear, model)
        if reason is not None:
            raise TypeError(f"{name} can't be adapted: {reason}")
    # In the model's order, whatever that of the patterns.
    return {name: linear for name, linear in linears.items() if name in found}


def _all_linear(model: nn.Module, linears: dict[str, nn.Linear]) -> dict[str, nn.Linear]:
    head = output_embeddings(model)
    found, refused = {}, []
    for name, linear in linears.items():
        if linear is head:
            continue
        reason = why_not_here(name, linear, model)
        if reason is None:
            found[name] = linear
        else:
            refused.append(f"{name}: {reason}")
    if refused:
        warnings.warn("left as they are: " + "; ".join(refused), stacklevel=4)
    if not found:
        raise ValueError(f"targets is {ALL_LINEAR!r}, and the model has no nn.Linear left to adapt")
    return found


def _nothing_matches(pattern: Pattern, model: nn.Module, linears: dict[str, nn.Linear]) -> str:
    if isinstance(pattern, str):
        return (
            f"targets is {pattern!r}, a regex that matches the full name of no nn.Linear "
            f"(for a name or its ending pass [{pattern!r}])"
        )
    (name,) = pattern
    for other, module in model.named_modules():
        if matches(pattern, other) and isinstance(module, LoRALinear):
            return f"targets has {name!r}, and {other} is adapted already"
    endings = sorted({full.rpartition(".")[2] for full in linears})
    close = difflib.get_close_matches(name, endings, n=1)
    hint = f", did you mean {close[0]!r}?" if close else f" (there are {', '.join(endings)})"
    return f"targets has {name!r}, which is the name of no nn.Linear in the model{hint}"


def replace(model: nn.Module, replacements: dict[str, nn.Module]) -> nn.Module:
    """Puts modules in place by name; returns the model, or what replaced it."""
    for name, module in replacements.items():
        if not name:
            return module
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    return model
