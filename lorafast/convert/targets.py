"""Which layers of a model to adapt, by the rules of PEFT's ``target_modules``."""

import difflib
import re
import warnings
from collections.abc import Iterable

from torch import nn

from lorafast.convert.kinds import PLAIN, has_peft_adapter, kind_of, kind_of_layer
from lorafast.convert.left_out import large_share
from lorafast.convert.places import COMPILED, why_not_here
from lorafast.nn import AdapterLayer

ALL_LINEAR = "all-linear"
Pattern = str | Iterable[str]
_NEAREST = 3
"""So many names are a hint."""

# Where Transformers keeps a classifier, as PEFT has it.
_CLASSIFIERS = ("score", "classifier")
_IN_CLASSIFIER = (
    "part of the classifier, which starts at random and is no adapter's (train it whole and name it in "
    "modules_to_save)"
)


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
    """The layers of ``model`` that are adapted or of a kind that can be, in its order, each with all the
    names that reach it."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if kind_of(module) is not None:
            found.setdefault(module, []).append(name)
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of ``torch.compile`` and data parallelism, which rename layers.

    Raises:
        TypeError: it is no module.
    """
    check_module(model)
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif COMPILED in model._modules:
            model = model.get_submodule(COMPILED)
        else:
            return model


def check_module(model: object) -> None:
    """Raises ``TypeError`` unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected an nn.Module")


def check_without_peft(model: nn.Module) -> None:
    """Raises ``ValueError`` if the model has PEFT's adapters, which would be frozen with the rest."""
    for name, module in model.named_modules():
        if has_peft_adapter(module):
            raise ValueError(
                f"{name or 'the model'} has PEFT's adapter, expected a model without: "
                "lorafast.accelerate(model) makes PEFT's adapters fast"
            )


def find(model: nn.Module, targets: Pattern, exclude: Pattern | None) -> dict[nn.Module, list[str]]:
    """The layers to adapt, each with all the names that reach it; any of them selects it.

    Raises:
        ValueError: an argument is no pattern, nothing matches, one of several names matches nothing,
            or the model has PEFT's adapters.
        TypeError: a layer that was asked for can't be adapted.
    """
    targets = check_pattern("targets", targets)
    exclude = check_pattern("exclude", () if exclude is None else exclude)
    check_without_peft(model)
    layers = names_by_layer(model)
    for one in each(exclude):
        if not any(reaches(one, names) for names in layers.values()):
            raise ValueError(_nothing_matches("exclude", one, model))
    plain = {layer: names for layer, names in layers.items() if not isinstance(layer, AdapterLayer)}
    kept = {layer: names for layer, names in plain.items() if not reaches(exclude, names)}
    if targets == ALL_LINEAR:
        return _all_linear(model, kept)
    if targets == ():
        raise ValueError("targets is [], expected at least one name")
    for one in each(targets):
        if any(reaches(one, names) for names in kept.values()):
            continue
        excluded = [names[0] for names in plain.values() if reaches(one, names)]
        if excluded:
            raise ValueError(f"{given('targets', one)}, and exclude leaves out {excluded[0]}")
        raise ValueError(_nothing_matches("targets", one, model))
    found = {layer: names for layer, names in kept.items() if reaches(targets, names)}
    for layer, names in found.items():
        reason = why_not_here(names, layer, model)
        if reason is not None:
            raise TypeError(f"{names[0]} can't be adapted: {reason}")
    return found


def each(pattern: str | tuple[str, ...]) -> list[str | tuple[str, ...]]:
    """A regex, or several names one by one."""
    return [pattern] if isinstance(pattern, str) else [(name,) for name in pattern]


def given(argument: str, one: str | tuple[str, ...]) -> str:
    """How a message begins that is about a regex, or about one of several names."""
    return f"{argument} is {one!r}" if isinstance(one, str) else f"{argument} has {one[0]!r}"


def reaches(pattern: Pattern, names: list[str]) -> bool:
    """Whether a pattern names what has all these names."""
    return any(matches(pattern, name) for name in names)


def _all_linear(model: nn.Module, plain: dict[nn.Module, list[str]]) -> dict[nn.Module, list[str]]:
    head = output_head(model)
    in_head = set() if head is None else set(head.modules())
    found: dict[nn.Module, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for layer, names in plain.items():
        if not kind_of_layer(layer).in_all_linear:
            continue
        if layer in in_head:
            if names[0].partition(".")[0] in _CLASSIFIERS:
                refused.setdefault(_IN_CLASSIFIER, []).append(names[0])
            continue
        reason = why_not_here(names, layer, model)
        if reason is None:
            found[layer] = names
        else:
            refused.setdefault(reason, []).append(names[0])
    if refused:
        reasons = [f"{some(names)}: {reason}" for reason, names in refused.items()]
        warnings.warn("left as they are: " + "; ".join(reasons), stacklevel=4)
    if not found:
        elsewhere = large_share(model, trained=True)
        raise ValueError(
            f"targets is {ALL_LINEAR!r}, and the model has no nn.Linear left to adapt"
            + (f": {elsewhere}" if elsewhere else "")
        )
    return found


def _nothing_matches(argument: str, one: str | tuple[str, ...], model: nn.Module) -> str:
    what = given(argument, one)
    modules = dict(model.named_modules(remove_duplicate=False))
    hits = {name: module for name, module in modules.items() if matches(one, name)}
    adapted = [name for name, module in hits.items() if isinstance(module, AdapterLayer)]
    if adapted:
        return f"{what}, and {adapted[0]} is adapted already"
    if hits:
        # A module that holds others says less about what was meant.
        name = next((name for name in hits if not any(hits[name].children())), next(iter(hits)))
        return f"{what}, and {name or 'the model'} is a {_kind(hits[name])}, expected an {PLAIN}"
    if isinstance(one, str):
        layers = [name for names in names_by_layer(model).values() for name in names if name]
        return no_such(argument, one, layers)
    return f"{what}, which is the name of no {PLAIN} in the model{_nearest(one[0], model)}"


def _nearest(name: str, model: nn.Module) -> str:
    """A hint at what may have been meant: a layer that can be adapted, any other, all that can be."""
    layers = names_by_layer(model).values()
    known = sorted({full.rpartition(".")[2] for names in layers for full in names})
    close = closest(name, known)
    if close:
        return f", did you mean {close!r}?"
    others = {full.rpartition(".")[2]: module for full, module in model.named_modules() if full}
    close = closest(name, others)
    if close:
        return f" ({close!r} is a {_kind(others[close])})"
    return f" (there are {', '.join(known)})" if known else " (there is none)"


def _kind(module: nn.Module) -> str:
    """The name of its class, with the library's where it would pass for PyTorch's own."""
    kind = type(module)
    foreign = kind.__name__ == "Linear" and not isinstance(module, nn.Linear)
    return f"{kind.__module__}.{kind.__qualname__}" if foreign else kind.__name__


def closest(given: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that is nearest to what was given, or None if none is near."""
    return next(iter(difflib.get_close_matches(given, list(known), n=1)), None)


def no_such(
    argument: str, one: str | tuple[str, ...], names: list[str], what: str = "module"
) -> str:
    """The message about a regex, or one of several names, that reaches none of ``names``."""
    how = "a regex that matches the full name" if isinstance(one, str) else "which is the name"
    return f"{given(argument, one)}, {how} of no {what}{hint(one, names)}"


def hint(one: str | tuple[str, ...], names: list[str]) -> str:
    """A hint at what was meant by a regex, or one of several names, that reaches none of ``names``."""
    if isinstance(one, str) and reaches((one,), names):
        return f" (for a name or its ending pass [{one!r}])"
    return nearest(one if isinstance(one, str) else one[0], names)


def nearest(given: str, names: Iterable[str], full: bool = False) -> str:
    """A hint at the names that are nearest to what was given, or unless ``full`` at endings of them."""
    names = list(names)
    endings = {name.rpartition(".")[2]: None for name in names}
    plain = re.sub(r"\\\.", ".", given)
    known = names if full else {**endings, **dict.fromkeys(names)}
    close = difflib.get_close_matches(plain, known, n=_NEAREST)
    if not close:
        close = difflib.get_close_matches(plain.rpartition(".")[2], endings, n=_NEAREST)
        if full:
            close = [name for name in names if name.rpartition(".")[2] in close][:_NEAREST]
    if close:
        return f", did you mean {' or '.join(map(repr, close))}?"
    words = names if full else [one for one in endings if not one.isdigit()]
    return f" (there are {some(words)})" if words else ""


def some(names: list[str], most: int = 6) -> str:
    """``names`` as a list of words, the first of them if they are many."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def replace(model: nn.Module, replacements: dict[str, nn.Module]) -> nn.Module:
    """Puts modules in place by name; returns the model, or what replaced it."""
    for name, module in replacements.items():
        if not name:
            return module
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    return model
