"""Bottleneck adapters at the modules of a model: put in place, taken away, switched off.

A bottleneck is a child of the module at whose output it stands, and a forward hook there. So the module
stays what it is, its parent may read what it likes of it, and a checkpoint of the plain model fits.
"""

import difflib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorafast.convert import encoders
from lorafast.convert.fsdp import name_of_sharded
from lorafast.convert.places import why_not_called
from lorafast.convert.targets import ALL_LINEAR, Pattern, check_pattern, matches, unwrapped
from lorafast.core.dtypes import FLOATS
from lorafast.nn import AdapterLayer
from lorafast.nn.bottleneck import Bottleneck
from lorafast.nn.checks import check_dtype

CHILD = "bottleneck"
"""The name of the child."""


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


def adapt_bottlenecks(
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
) -> nn.Module:
    """As ``adapt`` of these kinds, which freezes the model afterwards."""
    inner = unwrapped(model)
    defaults = KINDS[kind]
    if bottleneck is not None and reduction_factor is not None:
        raise ValueError("bottleneck and reduction_factor are both given, expected one of them")
    factor = defaults.reduction_factor if reduction_factor is None else reduction_factor
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor > 0:
        raise ValueError(f"reduction_factor is {factor!r}, expected a number above 0")
    check_dtype("adapter_dtype", adapter_dtype)
    found = _find(inner, kind, targets, exclude)
    sharded = name_of_sharded(inner, set(found))
    if sharded is not None:
        raise TypeError(
            f"{sharded} is sharded by FSDP, expected a whole model: adapt it before that"
        )
    made: dict[nn.Module, Bottleneck] = {}
    for module, name in found.items():
        K, N = widths(inner, name, module, kind == "parallel")
        device, dtype = device_and_dtype(inner, module)
        made[module] = Bottleneck(
            K,
            bottleneck if bottleneck is not None else max(int(K // factor), 1),
            N,
            activation=activation or defaults.activation,
            scaling=defaults.scaling if scaling is None else scaling,
            layer_norm=layer_norm,
            init=init,
            device=device,
            dtype=adapter_dtype or dtype,
        )
        made[module].parallel = kind == "parallel"
        made[module].train(module.training)
    for module, one in made.items():
        put_at(module, one)
    return model


def put_at(module: nn.Module, bottleneck: Bottleneck) -> None:
    """Makes it the module's child, and its hook."""
    module.add_module(CHILD, bottleneck)
    module.register_forward_hook(bottleneck.at_output, with_kwargs=True)


def bottlenecks(model: nn.Module) -> dict[str, Bottleneck]:
    """The bottlenecks that stand at modules of ``model``, by the names of these."""
    return {
        name: child
        for name, module in model.named_modules()
        if isinstance(child := module._modules.get(CHILD), Bottleneck)
        and any(_is_of(hook, child) for hook in module._forward_hooks.values())
    }


def _is_of(hook: Any, bottleneck: Bottleneck) -> bool:
    return getattr(hook, "__self__", None) is bottleneck


def remove_bottlenecks(model: nn.Module) -> nn.Module:
    """Takes all bottleneck adapters away; what was frozen stays so. Returns ``model``."""
    inner = unwrapped(model)
    for name in bottlenecks(inner):
        remove_bottleneck(inner.get_submodule(name))
    encoders.undo(inner)
    return model


def remove_bottleneck(module: nn.Module) -> None:
    """Takes away the one that stands at a module, if there is one."""
    bottleneck = module._modules.get(CHILD)
    if not isinstance(bottleneck, Bottleneck):
        return
    for key, hook in list(module._forward_hooks.items()):
        if _is_of(hook, bottleneck):
            del module._forward_hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)
    del module._modules[CHILD]


def _find(
    model: nn.Module, kind: str, targets: Pattern, exclude: Pattern | None
) -> dict[nn.Module, str]:
    """The modules at whose outputs bottlenecks are to stand, and their names."""
    exclude = check_pattern("exclude", () if exclude is None else exclude)
    modules = dict(model.named_modules())
    if targets == ALL_LINEAR:
        names = _by_structure(model, modules, kind)
    else:
        names = _named(check_pattern("targets", targets), modules)
    names = [name for name in names if not matches(exclude, name)]
    if not names:
        raise ValueError("exclude leaves out all that targets names")
    for name in names:
        reason = why_not_here(model, name, modules[name])
        if reason is not None:
            raise TypeError(f"{name} can't have a bottleneck: {reason}")
    return {modules[name]: name for name in names}


def why_not_here(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why no bottleneck can stand at the output of a module, or None."""
    if CHILD in module._modules or isinstance(module, Bottleneck):
        return "it has one already"
    if isinstance(module, AdapterLayer):
        return f"it is a {type(module).__name__}, which has an adapter of another kind"
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return (
            f"it is a {type(module).__name__}, which has no output of its own: name its last module"
        )
    if hasattr(module, CHILD):
        return f"it has an attribute {CHILD!r} of its own"
    return why_not_called([name], model, "adapt")


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


def _named(targets: str | tuple[str, ...], modules: dict[str, nn.Module]) -> list[str]:
    if targets == ():
        raise ValueError("targets is [], expected at least one name")
    each: list[Any] = [targets] if isinstance(targets, str) else [(name,) for name in targets]
    for one in each:
        if any(name and matches(one, name) for name in modules):
            continue
        if isinstance(one, str):
            raise ValueError(f"targets is {one!r}, a regex that matches the full name of no module")
        endings = {name.rpartition(".")[2] for name in modules if name}
        close = difflib.get_close_matches(one[0], sorted({*endings, *modules} - {""}), n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"targets has {one[0]!r}, which is the name of no module{hint}")
    return [name for name in modules if name and matches(targets, name)]


def widths(model: nn.Module, name: str, module: nn.Module, parallel: bool) -> tuple[int, int]:
    """The width of what a bottleneck at a module reads, and of what it adds to.

    Raises:
        ValueError: they can't be told.
    """
    pairs = [pair for one in module.modules() if (pair := _features(one)) is not None]
    if not pairs:  # a dropout after the layer that makes its input
        parent = model.get_submodule(name.rpartition(".")[0])
        pairs = [pair for one in parent.children() if (pair := _features(one)) is not None]
    hidden = getattr(getattr(model, "config", None), "hidden_size", None)
    first = pairs[0][0] if pairs else hidden
    last = pairs[-1][1] if pairs else hidden
    if not isinstance(module, nn.Linear) and isinstance(hidden, int) and any(module.children()):
        first = last = hidden
    if not isinstance(first, int) or not isinstance(last, int):
        raise ValueError(
            f"the width of {name}'s output can't be told, for there is no linear layer in it: name "
            "another module"
        )
    return (first, last) if parallel else (last, last)


def _features(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.LayerNorm):
        return (module.normalized_shape[-1],) * 2
    if isinstance(module, AdapterLayer):
        return module.in_features, module.out_features
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int):
        return sizes[0], sizes[1]
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        plain: Any = module
        return plain.weight.shape[0], plain.nf
    return None


def device_and_dtype(model: nn.Module, module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where, and in which dtype, a bottleneck at a module belongs."""
    for owner in (module, model):
        for parameter in owner.parameters():
            if parameter.dtype in FLOATS:
                return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.get_default_dtype()
