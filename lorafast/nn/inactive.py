"""Several adapters of one layer: one is active, the others wait beside it under their names.

The active one's parameters are the layer's own, ``lora_A`` and ``lora_B``: its forward knows of no
others. An inactive one's are those of a submodule, ``inactive.<name>``, so that they move, are copied
and are saved with the layer: in a ``state_dict`` they are ``inactive.<name>.lora_A``. A change of the
active one exchanges ``nn.Parameter`` objects and not values: an optimizer goes on with those that it was
given.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lorafast.nn.checks import check_probability
from lorafast.ops import kept_norm

INACTIVE = "inactive"
FIRST = "default"
"""What the adapter is called that ``adapt`` made, as PEFT calls it."""
_ACTIVE = "adapter"
"""Of the metadata of a ``state_dict``: the name of the layer's active adapter."""
# What a layer knows of its adapter beside the parameters.
_SETTINGS = ("_r", "_alpha", "_scaling", "_use_rslora", "_use_dora", "dropout")


class InactiveAdapter(nn.Module):
    """The parameters of an adapter that waits, and what its layer knows of it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings
        self.may_be_missing = False
        """Whether what is loaded next is a checkpoint of the plain layer."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *others: Any, **more: Any
    ) -> None:
        if self.may_be_missing and not any(key.startswith(prefix) for key in state_dict):
            return
        super()._load_from_state_dict(state_dict, prefix, *others, **more)

    def extra_repr(self) -> str:
        """Its rank and alpha."""
        return f"r={self.settings['_r']}, alpha={self.settings['_alpha']:g}"


class InactiveAdapters(nn.Module):
    """The adapters of a layer that wait, by name."""


def names_of(layer: Any) -> list[str]:
    """The names of the layer's adapters, the active one first."""
    return [layer._adapter_name, *waiting(layer)]


def waiting(layer: Any) -> dict[str, Any]:
    """The inactive adapters of ``layer`` by name."""
    there = layer._modules.get(INACTIVE)
    return {} if there is None else there._modules


def check_alone(layer: Any) -> None:
    """Raises ``ValueError`` if ``layer`` has adapters that wait."""
    if waiting(layer):
        raise ValueError(f"it has the adapters {', '.join(names_of(layer))}: delete all but one")


def add(
    layer: Any,
    name: str,
    r: int,
    *,
    alpha: float | None,
    dropout: float,
    use_rslora: bool,
    use_dora: bool,
    adapter_dtype: torch.dtype | None,
) -> None:
    """Gives ``layer`` a fresh adapter, which waits.

    Raises:
        ValueError: an argument doesn't fit the layer, which is unchanged then.
    """
    dropout = check_probability("dropout", dropout)
    parameters = layer.adapter_parameters()
    first = next(iter(parameters.values()))
    groups = getattr(layer, "groups", 1)
    if use_dora and ("lora_magnitude" not in layer.peft_names or groups > 1):
        raise ValueError(f"use_dora is True, and a {type(layer).__name__} like this has no DoRA")
    if isinstance(r, int) and r % groups:
        raise ValueError(f"r is {r}, expected a multiple of its {groups} groups")
    before, buffers = dict(vars(layer)), dict(layer._buffers)
    own = _take(layer)
    try:
        layer._set(layer.in_features, layer.out_features, r, alpha, use_rslora, use_dora)
        if "dropout" in before:
            layer.dropout = dropout
        layer._add_adapter(first.dtype, first.device, adapter_dtype or first.dtype)
        made = _take(layer)
    finally:
        for parameter in layer.peft_names:
            layer._parameters.pop(parameter, None)
        vars(layer).update(before)
        layer._buffers.update(buffers)
        _put(layer, own)
    made.requires_grad_(False)
    if INACTIVE not in layer._modules:
        layer._modules[INACTIVE] = InactiveAdapters()
    waiting(layer)[name] = made


def remove(layer: Any, name: str) -> None:
    """Forgets an inactive adapter."""
    del waiting(layer)[name]
    if not waiting(layer):
        del layer._modules[INACTIVE]


def exchange(layer: Any, name: str) -> None:
    """Makes the adapter ``name`` the active one; a merged layer keeps its merged weight."""
    if name == layer._adapter_name:
        return
    own, there = _take(layer), waiting(layer)
    order = [(layer._adapter_name, own) if one == name else (one, there[one]) for one in there]
    _put(layer, there[name])
    there.clear()
    there.update(order)
    layer._adapter_name = name
    kept_norm.forget(layer)
    layer._set_merged(layer.merged)  # which DoRA has a part in


@contextlib.contextmanager
def shown(layer: Any, name: str) -> Iterator[None]:
    """Within the block the adapter ``name`` is the active one, and the layer isn't merged."""
    before, merged = layer._adapter_name, layer.merged
    layer._set_merged(False)
    exchange(layer, name)
    try:
        yield
    finally:
        exchange(layer, before)
        layer._set_merged(merged)


def describe_active(layer: Any, destination: Any, prefix: str) -> None:
    """Notes in the metadata of a ``state_dict`` which of several adapters is active: no key more."""
    metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
    if metadata is not None and waiting(layer):
        metadata[_ACTIVE] = layer._adapter_name


def follow(layer: Any, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Makes that adapter the active one that is it in a state, by its metadata; where these are lost (a
    dictionary made anew, safetensors), the only one that doesn't wait there.

    It is trained then if the one was that it takes the place of, and a warning says so. Another says
    what of the layer's adapters the state lacks, or what it has besides.
    """
    start = f"{prefix}{INACTIVE}."
    found = {
        key.removeprefix(start).partition(".")[0] for key in state_dict if key.startswith(start)
    }
    known = {*names_of(layer)}
    if len(known) == 1 and not found:
        return
    said = metadata.get(_ACTIVE)
    left = known - found
    if not isinstance(said, str):
        said = left.pop() if len(left) == 1 and found <= known else None
    has_active = any(prefix + name in state_dict for name in layer.adapter_shapes())
    if has_active and said in known and said != layer._adapter_name:
        _activate(layer, said)
    if has_active or found:  # else it is no state of the layer, or one of the plain layer
        _warn_of_a_part(layer, found, has_active, said)


def _activate(layer: Any, name: str) -> None:
    before = layer.adapter_parameters().values()
    trained = any(parameter.requires_grad for parameter in before)
    for parameter in before:
        parameter.requires_grad_(False)
    warnings.warn(
        f"the state has the adapter {name!r} active, and so has the model now: an optimizer must have "
        "been given the parameters of all adapters",
        stacklevel=4,
    )
    exchange(layer, name)
    for parameter in layer.adapter_parameters().values():
        parameter.requires_grad_(trained)


def _warn_of_a_part(layer: Any, found: set[str], has_active: bool, said: str | None) -> None:
    names = names_of(layer)
    lacking = [name for name in names if name not in found and (name != names[0] or not has_active)]
    if lacking:
        sentence = f"the state lacks the adapters {', '.join(lacking)}, which keep their values"
        if has_active and said is None:
            sentence += (
                f"; what it has without a name goes to the active one, {names[0]!r}: if it is "
                "another's, call set_adapter before"
            )
        warnings.warn(sentence, stacklevel=4)
    if has_active and said is not None and said not in names:
        warnings.warn(
            f"the state has the adapter {said!r} active, which the model hasn't: its values go to "
            f"{names[0]!r}, the model's active one; call add_adapter before",
            stacklevel=4,
        )
    if names[0] in found:
        warnings.warn(
            f"in the state the adapter {names[0]!r} waits, which is the model's active one: it isn't "
            "loaded; call set_adapter before",
            stacklevel=4,
        )
    more = sorted(found - {*names})
    if more:
        warnings.warn(
            f"the state has the adapters {', '.join(more)}, which the model hasn't and which aren't "
            "loaded: call add_adapter before",
            stacklevel=4,
        )


def _take(layer: Any) -> InactiveAdapter:
    """The active adapter's parameters and settings; the layer has none then."""
    held = InactiveAdapter({name: getattr(layer, name) for name in _SETTINGS})
    held.training = layer.training
    for name in layer.adapter_shapes():
        held._parameters[name] = layer._parameters.pop(name)
    return held


def _put(layer: Any, held: InactiveAdapter) -> None:
    for name, value in held.settings.items():
        if getattr(layer, name) != value:
            vars(layer)[name] = value
    layer._parameters.update(held._parameters)
