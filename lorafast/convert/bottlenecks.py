"""Bottleneck adapters at the modules of a model: put in place, taken away, switched off.

A bottleneck is a child of the module at whose output it stands, and a forward hook there. So the module
stays what it is, its parent may read what it likes of it, and a checkpoint of the plain model fits: a
bottleneck of which it has no tensor stays as it is.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorafast.convert import checkpointing, encoders
from lorafast.convert.fsdp import name_of_sharded
from lorafast.convert.kinds import adapter_parameters
from lorafast.convert.places import why_not_called
from lorafast.convert.targets import (
    ALL_LINEAR,
    Pattern,
    check_pattern,
    check_without_peft,
    each,
    no_such,
    reaches,
    unwrapped,
)
from lorafast.core.dtypes import FLOATS
from lorafast.nn import AdapterLayer
from lorafast.nn.bottleneck import CHILD, Bottleneck, bottleneck_at, take_away
from lorafast.nn.checks import check_dtype


@dataclass(frozen=True)
class Defaults:
    """What a kind has where nothing is said: as in AdapterHub's ``adapters``."""

    activation: str
    scaling: float
    reduction_factor: float


KINDS = {
    "houlsby": Defaults("silu", 1.0, 16.0),
    "pfeiffer": Defaults("relu", 1.0, 16.0),
    "parallel": Defaults("relu", 4.0, 2.0),
}
_BERT = (("attention.output.dropout",), ("output.dropout",))
_BLOCKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "llama": (("self_attn",), ("mlp",)),
    "mistral": (("self_attn",), ("mlp",)),
    "gpt2": (("attn",), ("mlp",)),
    "vit": (("attention.output.dropout", "attention"), ("output.dropout", "mlp")),
}
"""By ``config.model_type``: in each block what attention, and what the MLP, add to the residual stream;
the first name that a block has."""

_WITHOUT_OUTPUT = (nn.ParameterList, nn.ParameterDict, nn.modules.loss._Loss)
_CHANNELS_SECOND = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
_OF_INDICES = (nn.Embedding, nn.EmbeddingBag)


def make_bottlenecks(
    model: nn.Module,
    kind: str,
    targets: Pattern = ALL_LINEAR,
    *,
    bottleneck: int | None = None,
    reduction_factor: float | None = None,
    activation: str | None = None,
    scaling: float | None = None,
    layer_norm: bool = False,
    init: str = "zero",
    exclude: Pattern | None = None,
    adapter_dtype: torch.dtype | None = None,
) -> dict[nn.Module, Bottleneck]:
    """Those of ``adapt`` of these kinds, by the modules at which they are to stand."""
    defaults = KINDS[kind]
    if bottleneck is not None and reduction_factor is not None:
        raise ValueError("bottleneck and reduction_factor are both given, expected one of them")
    factor = defaults.reduction_factor if reduction_factor is None else reduction_factor
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor > 0:
        raise ValueError(f"reduction_factor is {factor!r}, expected a number above 0")
    check_dtype("adapter_dtype", adapter_dtype)
    check_without_peft(model)
    found = _find(model, kind, targets, exclude)
    sharded = name_of_sharded(model, found)
    if sharded is not None:
        raise TypeError(
            f"{sharded} is sharded by FSDP, expected a whole model: adapt it before that"
        )
    made: dict[nn.Module, Bottleneck] = {}
    for module, name in found.items():
        K, N = widths(model, name, module, kind == "parallel")
        device, dtype = device_and_dtype(model, name)
        b = bottleneck
        if b is None:
            if not K // factor < 2**31:
                raise ValueError(
                    f"reduction_factor is {factor!r}, of which {K} is too large a multiple"
                )
            b = max(int(K // factor), 1)
        with torch.inference_mode(False):  # or they could never be trained
            made[module] = Bottleneck(
                K,
                b,
                N,
                activation=defaults.activation if activation is None else activation,
                scaling=defaults.scaling if scaling is None else scaling,
                layer_norm=layer_norm,
                init=init,
                device=device,
                dtype=adapter_dtype or dtype,
            )
        made[module].parallel = kind == "parallel"
        made[module].train(module.training)
    return made


def bottlenecks(model: nn.Module) -> dict[str, Bottleneck]:
    """The bottlenecks that stand at modules of ``model``, by the names of these."""
    return {
        name: one
        for name, module in model.named_modules()
        if (one := bottleneck_at(module)) is not None
    }


def remove_bottlenecks(model: nn.Module) -> nn.Module:
    """Takes all bottleneck adapters away; what was frozen stays so. Returns ``model``."""
    inner = unwrapped(model)
    for module in list(inner.modules()):
        take_away(module)
    encoders.undo(inner)
    if not adapter_parameters(inner):
        checkpointing.undo(inner)
    return model


def _find(
    model: nn.Module, kind: str, targets: Pattern, exclude: Pattern | None
) -> dict[nn.Module, str]:
    """The modules at whose outputs bottlenecks are to stand, and their first names; any of a module's
    names selects it, or leaves it out."""
    exclude = check_pattern("exclude", () if exclude is None else exclude)
    every: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and not is_in_bottleneck(model, name):
            every.setdefault(module, []).append(name)
    _check_names("exclude", exclude, every)
    if targets == ALL_LINEAR:
        places = set(_by_structure(model, dict(model.named_modules()), kind))
        found = {module: names for module, names in every.items() if not places.isdisjoint(names)}
    else:
        named = check_pattern("targets", targets)
        if named == ():
            raise ValueError("targets is [], expected at least one name")
        _check_names("targets", named, every)
        found = {module: names for module, names in every.items() if reaches(named, names)}
    found = {module: names for module, names in found.items() if not reaches(exclude, names)}
    if not found:
        raise ValueError("exclude leaves out all that targets names")
    for module, names in found.items():
        reason = why_not_here(model, names, module, kind == "parallel")
        if reason is not None:
            raise TypeError(f"{names[0]} can't have a bottleneck: {reason}")
    return {module: names[0] for module, names in found.items()}


def is_in_bottleneck(model: nn.Module, name: str) -> bool:
    """Whether the module of this name is a part of a bottleneck."""
    around = name.rpartition(".")[0]
    return bool(around) and (
        isinstance(model.get_submodule(around), Bottleneck) or is_in_bottleneck(model, around)
    )


def why_not_here(
    model: nn.Module, names: list[str], module: nn.Module, parallel: bool
) -> str | None:
    """Why no bottleneck can stand at the output of a module, or beside it, or None."""
    if CHILD in module._modules or isinstance(module, Bottleneck):
        return "it has one already"
    if any(is_in_bottleneck(model, name) for name in names):
        return "it is a part of one"
    if isinstance(module, AdapterLayer):
        return f"it is a {type(module).__name__}, which has an adapter of another kind"
    kind = type(module).__name__
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return f"it is a {kind}, which has no output of its own: name its last module"
    if isinstance(module, _WITHOUT_OUTPUT):
        return f"it is a {kind}, which gives no features"
    if isinstance(module, _CHANNELS_SECOND):
        return (
            f"it is a {kind}, whose channels come second, and a bottleneck is over what comes last"
        )
    if parallel and isinstance(module, _OF_INDICES):
        return f"it is a {kind}, which reads indices, beside which no parallel bottleneck can stand"
    if parallel and isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return f"it is a {kind}, whose states are of a width of their own: name a layer after it"
    if hasattr(module, CHILD):
        return f"it has an attribute {CHILD!r} of its own"
    return why_not_called(names, model, "adapt")


def _by_structure(model: nn.Module, modules: dict[str, nn.Module], kind: str) -> list[str]:
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if family not in _BLOCKS:
        raise ValueError(
            f"targets isn't given, and where {kind} adapters belong is known of "
            f"{', '.join(_BLOCKS)} alone: name the modules after which they go"
        )
    attention, mlp = _BLOCKS[family]
    if kind == "parallel" and mlp[0] == "output.dropout" and not _has_mlp(model):
        raise ValueError(
            f"targets isn't given, and a {family} model has no module that is its whole MLP: name the "
            "modules beside which parallel adapters go"
        )
    found = []
    for parent, blocks in modules.items():
        if not isinstance(blocks, nn.ModuleList):
            continue
        for index in blocks._modules:
            block = f"{parent}.{index}" if parent else index
            names = [_first(block, places, modules) for places in (attention, mlp)]
            if all(names):
                found += [name for name in names if name]
                if kind != "houlsby":
                    del found[-2]
    if not found:
        raise ValueError(f"targets isn't given, and the {family} model has no block that is known")
    return found


def _has_mlp(model: nn.Module) -> bool:
    return any(name.endswith(".mlp") for name, _ in model.named_modules())


def _first(block: str, places: tuple[str, ...], modules: dict[str, nn.Module]) -> str | None:
    return next((f"{block}.{place}" for place in places if f"{block}.{place}" in modules), None)


def _check_names(
    argument: str, pattern: str | tuple[str, ...], every: dict[nn.Module, list[str]]
) -> None:
    """Raises ``ValueError`` unless a regex, or each of several names, is the name of a module."""
    known = {name for names in every.values() for name in names}
    for one in each(pattern):
        if not reaches(one, list(known)):
            raise ValueError(no_such(argument, one, sorted(known)))


def widths(model: nn.Module, name: str, module: nn.Module, parallel: bool) -> tuple[int, int]:
    """The width of what a bottleneck at a module reads, and of what it adds to.

    Raises:
        ValueError: they can't be told.
    """
    hidden = getattr(getattr(model, "config", None), "hidden_size", None)
    pairs = _features_in(module)
    sizes = _sizes(module)
    if not pairs and (sizes or any(module.children())):
        first = last = hidden if hidden in sizes or not sizes else None
    elif not pairs:  # a dropout after the layer that makes its input, whose width it keeps
        parent = model.get_submodule(name.rpartition(".")[0])
        beside = sorted({N for one in parent.children() for _, N in _features_of(one)})
        if len(beside) > 1:
            raise ValueError(
                f"the width of {name}'s output can't be told, for the layers beside it have outputs of "
                f"{' and '.join(map(str, beside))} features: name another module"
            )
        first = last = beside[0] if beside else hidden
    elif not isinstance(module, nn.Linear) and isinstance(hidden, int) and any(module.children()):
        first = last = hidden
    else:
        first, last = pairs[0][0], pairs[-1][1]
    if not isinstance(first, int) or not isinstance(last, int):
        raise ValueError(
            f"the width of {name}'s output can't be told, for there is no linear layer in it: name "
            "another module"
        )
    return (first, last) if parallel else (last, last)


def _features_in(module: nn.Module) -> list[tuple[int, int]]:
    """The widths of what ``module`` is and holds, bottlenecks aside."""
    if isinstance(module, Bottleneck):
        return []
    own = _features_of(module)
    return own or [pair for child in module.children() for pair in _features_in(child)]


def _sizes(module: nn.Module) -> set[int]:
    """Those of all parameters and buffers in ``module``."""
    tensors = (*module.parameters(), *module.buffers())
    return {size for one in tensors if not nn.parameter.is_lazy(one) for size in one.shape}


def _features_of(module: nn.Module) -> list[tuple[int, int]]:
    pair = _features(module)
    return [] if pair is None or isinstance(module, Bottleneck) else [pair]


def _features(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return (module.normalized_shape[-1],) * 2
    if isinstance(module, _OF_INDICES):
        return (module.embedding_dim,) * 2
    if isinstance(module, nn.RNNBase):
        directions = 2 if module.bidirectional else 1
        return module.input_size, directions * (module.proj_size or module.hidden_size)
    if isinstance(module, nn.RNNCellBase):
        return module.input_size, module.hidden_size
    if isinstance(module, AdapterLayer):
        return module.in_features, module.out_features
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int):
        return sizes[0], sizes[1]
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        plain: Any = module
        return plain.weight.shape[0], plain.nf
    return None


def device_and_dtype(model: nn.Module, name: str) -> tuple[torch.device, torch.dtype]:
    """Where, and in which dtype, a bottleneck at a module belongs: as the parameters of the module, else
    of the closest one around it that has any, adapters aside."""
    adapters = {id(parameter) for parameter in adapter_parameters(model)}
    while True:
        for parameter in model.get_submodule(name).parameters():
            if parameter.dtype in FLOATS and id(parameter) not in adapters:
                return parameter.device, parameter.dtype
        if not name:
            return torch.device("cpu"), torch.get_default_dtype()
        name = name.rpartition(".")[0]
