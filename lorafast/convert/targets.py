"""Which layers of a model to adapt, by the rules of PEFT's ``target_modules``."""

import difflib
import re
import warnings
from collections.abc import Iterable

from torch import nn

from lorafast.nn import LoRALinear
from lorafast.nn.lora_linear import why_not_adaptable
from lorafast.nn.plain import stock_class

ALL_LINEAR = "all-linear"
Pattern = str | Iterable[str]

# What torch.compile calls the module that it wraps.
COMPILED = "_orig_mod"

# Where Transformers keeps a classifier, as PEFT has it.
_CLASSIFIERS = ("score", "classifier")
# What the fused kernels of state-space mixers (Mamba and its kin) take as bare weights.
_READ_BY_MAMBA = ("x_proj", "dt_proj", "out_proj")


def matches(pattern: Pattern, name: str) -> bool:
    """A string is a regex over the whole name; of several names each is it or a suffix of it."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in pattern)


def check_regex(argument: str, regex: str) -> str:
    """``regex``; ``ValueError`` if it is none."""
    try:
        re.compile(regex)
    except re.error as error:
        raise ValueError(
            f"{argument} is {regex!r}, which is not a regex: {error} (names go into a list)"
        ) from error
    return regex


def check_names(argument: str, names: object) -> tuple[str, ...]:
    """``names`` as a tuple; ``ValueError`` if they are anything but several non-empty strings."""
    found = tuple(names) if isinstance(names, Iterable) and not isinstance(names, str) else None
    if found is None or not all(isinstance(name, str) and name for name in found):
        raise ValueError(f"{argument} is {found or names!r}, expected a list of names")
    return found


def check_pattern(argument: str, pattern: object) -> str | tuple[str, ...]:
    """``pattern``, names as a tuple; ``ValueError`` if it is neither a regex nor names."""
    if isinstance(pattern, str):
        return check_regex(argument, pattern)
    return check_names(argument, pattern)


def output_head(model: nn.Module) -> nn.Module | None:
    """The head of a Transformers model, which ``all-linear`` leaves out as PEFT does.

    It is the output embedding, or else the classifier, which starts at random: an adapter over one
    draw of it is worthless over another.
    """
    getter = getattr(model, "get_output_embeddings", None)
    if not callable(getter):
        return None
    heads = [getter(), *(getattr(model, name, None) for name in _CLASSIFIERS)]
    return next((head for head in heads if isinstance(head, nn.Module)), None)


def names_by_layer(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The linear and LoRA layers of ``model`` in its order, each with all the names that reach it."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoRALinear) or stock_class(module) is not None:
            found.setdefault(module, []).append(name)
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of ``torch.compile`` and data parallelism, which rename layers."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif COMPILED in model._modules:
            model = model.get_submodule(COMPILED)
        else:
            return model


def why_not_here(names: Iterable[str], module: nn.Module, model: nn.Module) -> str | None:
    """The reason for which the layer can't be adapted at its places in the model, or None."""
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        if child == COMPILED:
            return "torch.compile goes on calling the layer that it was given: adapt it before"
        if isinstance(parent, nn.MultiheadAttention):
            return "nn.MultiheadAttention reads its weight without calling it"
        if child in _READ_BY_MAMBA and hasattr(parent, "A_log") and hasattr(parent, "D"):
            return f"{type(parent).__name__} reads its weight without calling it"
    return why_not_adaptable(module)


def find(model: nn.Module, targets: Pattern, exclude: Pattern | None) -> dict[nn.Module, list[str]]:
    """The layers to adapt, each with all the names that reach it; any of them selects it.

    Raises:
        ValueError: an argument is no pattern, nothing matches, or one of several names matches
            nothing.
        TypeError: a layer that was asked for can't be adapted.
    """
    targets = check_pattern("targets", targets)
    exclude = check_pattern("exclude", () if exclude is None else exclude)
    layers = names_by_layer(model)
    for one in _each(exclude):
        if not any(_reaches(one, names) for names in layers.values()):
            raise ValueError(_nothing_matches("exclude", one, model))
    linears = {layer: names for layer, names in layers.items() if not isinstance(layer, LoRALinear)}
    kept = {layer: names for layer, names in linears.items() if not _reaches(exclude, names)}
    if targets == ALL_LINEAR:
        return _all_linear(model, kept)
    if targets == ():
        raise ValueError("targets is [], expected at least one name")
    for one in _each(targets):
        if any(_reaches(one, names) for names in kept.values()):
            continue
        excluded = [names[0] for names in linears.values() if _reaches(one, names)]
        if excluded:
            raise ValueError(f"{_given('targets', one)}, and exclude leaves out {excluded[0]}")
        raise ValueError(_nothing_matches("targets", one, model))
    found = {layer: names for layer, names in kept.items() if _reaches(targets, names)}
    for layer, names in found.items():
        reason = why_not_here(names, layer, model)
        if reason is not None:
            raise TypeError(f"{names[0]} can't be adapted: {reason}")
    return found


def _each(pattern: str | tuple[str, ...]) -> list[str | tuple[str, ...]]:
    return [pattern] if isinstance(pattern, str) else [(name,) for name in pattern]


def _given(argument: str, one: str | tuple[str, ...]) -> str:
    return f"{argument} is {one!r}" if isinstance(one, str) else f"{argument} has {one[0]!r}"


def _reaches(pattern: Pattern, names: list[str]) -> bool:
    return any(matches(pattern, name) for name in names)


def _all_linear(
    model: nn.Module, linears: dict[nn.Module, list[str]]
) -> dict[nn.Module, list[str]]:
    head = output_head(model)
    in_head = set() if head is None else set(head.modules())
    found, refused = {}, []
    for layer, names in linears.items():
        if layer in in_head:
            if names[0].partition(".")[0] in _CLASSIFIERS:
                refused.append(
                    f"{names[0]}: part of the classifier, which starts at random and is no adapter's "
                    "(train it whole and name it in modules_to_save)"
                )
            continue
        reason = why_not_here(names, layer, model)
        if reason is None:
            found[layer] = names
        else:
            refused.append(f"{names[0]}: {reason}")
    if refused:
        warnings.warn("left as they are: " + "; ".join(refused), stacklevel=4)
    if not found:
        raise ValueError(f"targets is {ALL_LINEAR!r}, and the model has no nn.Linear left to adapt")
    return found


def _nothing_matches(argument: str, one: str | tuple[str, ...], model: nn.Module) -> str:
    given = _given(argument, one)
    if isinstance(one, str):
        return (
            f"{given}, a regex that matches the full name of no nn.Linear "
            f"(for a name or its ending pass [{one!r}])"
        )
    hits = {name: module for name, module in model.named_modules() if matches(one, name)}
    adapted = [name for name, module in hits.items() if isinstance(module, LoRALinear)]
    if adapted:
        return f"{given}, and {adapted[0]} is adapted already"
    if hits:
        name, module = next(iter(hits.items()))
        return f"{given}, and {name} is a {type(module).__name__}, expected an nn.Linear"
    layers = names_by_layer(model).values()
    endings = sorted({name.rpartition(".")[2] for names in layers for name in names})
    close = difflib.get_close_matches(one[0], endings, n=1)
    hint = f", did you mean {close[0]!r}?" if close else f" (there are {', '.join(endings)})"
    return f"{given}, which is the name of no nn.Linear in the model{hint}"


def replace(model: nn.Module, replacements: dict[str, nn.Module]) -> nn.Module:
    """Puts modules in place by name; returns the model, or what replaced it."""
    for name, module in replacements.items():
        if not name:
            return module
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    return model
