"""Several adapters by name in one model: one is active, and the model computes with that alone."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from lorafast.convert.exchange import set_trained
from lorafast.convert.fsdp import name_of_sharded
from lorafast.convert.kinds import adapted_layers
from lorafast.convert.targets import COMPILED, unwrapped
from lorafast.nn import AdapterLayer, inactive, offload


def add_adapter(
    model: nn.Module,
    name: str,
    r: int = 16,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    adapter_dtype: torch.dtype | None = None,
) -> None:
    """Gives every adapted layer of ``model`` a further adapter, a fresh one, which isn't active.

    The one that ``adapt`` made is called ``"default"``. The model computes with the active one alone;
    ``set_adapter`` says which that is. An inactive one is frozen, and its parameters' names begin with
    ``<layer>.inactive.<name>``, where the active one's begin with ``<layer>``. A ``state_dict`` has them
    all, and in its metadata, which ``torch.save`` keeps, the name of the active one: whoever loads it
    has the same one active. Without metadata (safetensors, a dictionary made anew) the one is active
    that doesn't wait there. A state with a part of the adapters, loaded with ``strict=False``, gives a
    warning that names those that it lacks; without metadata it doesn't say whose ``lora_A`` it has: call
    ``set_adapter`` before then. A load that fails may have changed the active one of some layers:
    ``set_adapter`` makes it one again.

    Args:
        model: a model with adapted layers; each gets one.
        name: of the adapter, without dots.
        r: rank, which may be another than that of the others.
        alpha, dropout, use_rslora, use_dora: as for ``adapt``.
        adapter_dtype: that of the parameters; None is that of the active adapter.

    Raises:
        ValueError: the model has an adapter of that name, or no adapted layer; an argument doesn't fit;
            a layer is sharded or offloaded, its adapter is computed by a parametrization, or it is one
            of PiSSA, OLoRA or CorDA, beside which a fresh one would begin at what these left of W; or
            the model is in ``DistributedDataParallel``. The model is unchanged.
    """
    check_not_parallel(model)

    def add(_: str, layer: AdapterLayer) -> None:
        if layer._local is not None:
            raise ValueError("lorafast.parallel has cut the layer: add adapters before")
        if layer.init_lora_weights is not None:
            raise ValueError(
                f"init_lora_weights was {layer.init_lora_weights!r}, which took a part of W away, and a "
                "fresh adapter would begin without it"
            )
        inactive.add(
            layer, name, r, alpha=alpha, dropout=dropout, use_rslora=use_rslora, use_dora=use_dora,
            adapter_dtype=adapter_dtype,
        )  # fmt: skip

    add_to_each(model, name, add)


def add_to_each(model: nn.Module, name: str, add: Callable[[str, AdapterLayer], None]) -> None:
    """Calls ``add`` with each adapted layer and its name; on an error none has the adapter ``name``."""
    layers = exchangeable(model)
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"name is {name!r}, expected one without dots")
    if name in _names(layers):
        raise ValueError(f"the model has an adapter {name!r} already")
    added = []
    try:
        for place, layer in layers.items():
            try:
                add(place, layer)
            except ValueError as error:
                raise ValueError(f"{place or 'the model'} can't have {name!r}: {error}") from error
            added.append(layer)
    except BaseException:
        for layer in added:
            inactive.remove(layer, name)
        raise


def set_adapter(model: nn.Module, name: str, *, is_trainable: bool = True) -> None:
    """Makes the adapter ``name`` the active one, which the model computes with; of all it alone trains.

    ``nn.Parameter`` objects are exchanged, not values: an optimizer that was given those of several
    adapters goes on with each where it was. To resume, build it as it was built: over all adapters'
    parameters, before ``set_adapter`` and before a state is loaded, since both change their order. As in
    PEFT, a gradient that the former one has stays: call ``optimizer.zero_grad()`` before. Merged
    layers are merged anew.

    Args:
        model: a model with adapters of several names.
        name: of the adapter.
        is_trainable: whether it requires gradients; the others don't.

    Raises:
        ValueError: the model has no such adapter, an adapter's values can't be merged, a layer is
            sharded or offloaded, or the model is in ``DistributedDataParallel``. The model is unchanged.
    """
    check_not_parallel(model)
    layers = exchangeable(model)
    check_name(layers, name, one_active=False)
    before = [
        (layer, layer._adapter_name, dict(vars(layer)), dict(layer._buffers))
        for layer in layers.values()
    ]
    try:
        for layer, active, *_ in before:
            inactive.exchange(layer, name)
            if layer.merged and name != active:
                layer.merge()
    except BaseException:
        for layer, active, attributes, buffers in before:
            inactive.exchange(layer, active)
            vars(layer).update(attributes)
            layer._buffers.update(buffers)
        raise
    for layer in layers.values():
        for held in inactive.waiting(layer).values():
            set_trained(False, held.parameters())
        set_trained(is_trainable, layer.adapter_parameters().values())


def delete_adapter(model: nn.Module, name: str) -> None:
    """Forgets the adapter ``name``, which isn't active.

    Raises:
        ValueError: the model has no such adapter, it is the active one, or the model is in
            ``DistributedDataParallel``.
    """
    check_not_parallel(model)
    layers = exchangeable(model)
    if check_name(layers, name)[0] == name:
        raise ValueError(f"the adapter {name!r} is active: set another one before")
    for layer in layers.values():
        inactive.remove(layer, name)


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters of ``model``, the active one first.

    Raises:
        ValueError: the model has no adapted layer, or its layers have adapters of other names.
    """
    return tuple(_names(_layers(model)))


@contextlib.contextmanager
def showing(model: nn.Module, name: str | None) -> Iterator[None]:
    """Within the block the adapter ``name`` is the active one, and no layer is merged.

    None leaves all as it is.
    """
    with contextlib.ExitStack() as stack:
        if name is not None and check_name(_layers(model), name)[0] != name:
            for layer in exchangeable(model).values():
                stack.enter_context(inactive.shown(layer, name))
        yield


def check_name(layers: dict[str, AdapterLayer], name: str, *, one_active: bool = True) -> list[str]:
    """The names of the adapters, of which ``name`` must be one; else ``ValueError``."""
    names = _names(layers, one_active)
    if name not in names:
        raise ValueError(f"the model has no adapter {name!r}, but {' and '.join(map(repr, names))}")
    return names


def _layers(model: nn.Module) -> dict[str, AdapterLayer]:
    layers = adapted_layers(unwrapped(model))
    if not layers:
        raise ValueError("the model has no adapted layer: adapt it first")
    return layers


def _names(layers: dict[str, AdapterLayer], one_active: bool = True) -> list[str]:
    """Those of every layer; ``ValueError`` if one has others, or another one active."""
    (first, layer), *rest = layers.items()
    names = inactive.names_of(layer)
    for other, layer in rest:
        its = inactive.names_of(layer)
        if one_active and its[0] != names[0] and set(its) == set(names):
            raise ValueError(
                f"{first} has the adapter {names[0]!r} active, and {other} has {its[0]!r}: "
                "call set_adapter"
            )
        if set(its) != set(names):
            raise ValueError(
                f"{first} has the adapters {', '.join(names)}, and {other} has {', '.join(its)}: "
                "adapt all layers before you add adapters"
            )
    return names


def check_not_parallel(model: nn.Module) -> None:
    """Raises ``ValueError`` if ``model`` is in ``DistributedDataParallel``."""
    while COMPILED in model._modules:
        model = model.get_submodule(COMPILED)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "the model is in DistributedDataParallel, which reduces the gradients of the parameters "
            "that it was given alone: change the adapters of the model inside, and wrap that anew"
        )


def exchangeable(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapted layers; ``ValueError`` if the adapter of one can't be exchanged."""
    layers = _layers(model)
    sharded = name_of_sharded(unwrapped(model), layers.values())
    if sharded is not None:
        raise ValueError(
            f"{sharded} is sharded by FSDP, which keeps the parameters that it was given"
        )
    for name, layer in layers.items():
        where = name or "the model"
        if layer._rows is not None:
            raise ValueError(f"{where} is in a block of mixed, in which its adapters stay")
        if offload.hooks_of(layer):
            raise ValueError(
                f"{where} has Accelerate's hook, which keeps the parameters that it was given"
            )
        for parameter in layer.adapter_shapes():
            tensor = layer._parameters.get(parameter)
            if tensor is None:
                raise ValueError(f"{parameter} of {where} is computed by a parametrization")
            # One that lorafast.parallel has cut computes with the adapters that it had then.
            if hasattr(tensor, "full_tensor") and layer._local is None:
                raise ValueError(f"{parameter} of {where} is sharded")
    return layers
