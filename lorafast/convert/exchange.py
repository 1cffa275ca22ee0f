"""A loaded adapter's values go into a model, all of them or none."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorafast.convert.adapt import freeze_base, put_in_place
from lorafast.convert.all_or_nothing import all_or_nothing, copy_into
from lorafast.convert.kinds import kind_of_layer
from lorafast.convert.peft_format import AdapterConfig, stored_whole
from lorafast.convert.targets import names_by_layer
from lorafast.nn import AdapterLayer


def whole(tensor: Tensor) -> tuple[Tensor, bool]:
    """The tensor, gathered if it is sharded, and whether this process is its mesh's first."""
    if not hasattr(tensor, "full_tensor"):  # a DTensor, whose module is slow to import
        return tensor, True
    sharded: Any = tensor
    mesh = sharded.device_mesh
    # Offloaded shards are gathered where the mesh communicates.
    gathered: Tensor = sharded.to(mesh.device_type).full_tensor()
    coordinate = mesh.get_coordinate()  # None on a rank outside the mesh
    return gathered, coordinate is not None and not any(coordinate)


def why_not_replaceable(tensor: Tensor) -> str | None:
    """The reason for which values can't be copied into ``tensor``, or None."""
    if tensor.is_meta:
        return "it is on the device meta, which holds no values"
    if tensor.layout != torch.strided:
        return f"its layout is {tensor.layout}"
    if any(
        size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        return "it is expanded: its elements share memory"
    return None


def put_into(
    model: nn.Module,
    config: AdapterConfig,
    adapters: dict[str, dict[str, Tensor]],
    base: list[tuple[Tensor, Tensor]],
    is_trainable: bool | None,
) -> None:
    """Adapts the layers that aren't yet, and copies the values: ``base`` has pairs (tensor, its value).

    Everything fits: that was checked. Where it fails nonetheless, the model is as it was.
    """
    # What is made here may be trained later, as nothing can that is made in inference mode.
    with torch.inference_mode(False), torch.no_grad(), all_or_nothing(model) as undo:
        made: dict[nn.Module, AdapterLayer] = {}
        undo.made = made  # type: ignore[assignment]
        layers: dict[str, AdapterLayer] = {}
        for layer, names in names_by_layer(model).items():
            if names[0] not in adapters:
                continue
            if isinstance(layer, AdapterLayer):
                layers[names[0]] = layer
            else:
                layers[names[0]] = made[layer] = _make(layer, names[0], config)
        values = list(base)
        for name, parameters in adapters.items():
            own = layers[name].adapter_parameters()
            values += [(own[parameter], value) for parameter, value in parameters.items()]
        values = [(target, like(value, target)) for target, value in values]
        there = {name: layer for name, layer in layers.items() if layer not in made.values()}
        undo.keep([target for target, _ in values], there.values())

        for target, value in values:
            copy_into(target, value)
        for name, layer in there.items():
            layer.set_scaling(config.alpha(name), config.use_rslora)  # merges again what is merged
        if made:
            freeze_base(model)
        if is_trainable is not None:
            for layer in layers.values():
                set_trained(is_trainable, layer.adapter_parameters().values())
        if is_trainable is not None or made:
            set_trained(is_trainable is not False, _stored(model, config))
        in_place = {
            name: made[layer]
            for layer, names in names_by_layer(model).items()
            if layer in made
            for name in names
        }
        undo.replaced = {name: model.get_submodule(name) for name in in_place}
        put_in_place(model, in_place)


def _make(layer: nn.Module, name: str, config: AdapterConfig) -> AdapterLayer:
    return kind_of_layer(layer).layer.of_plain(
        layer,
        config.rank(name),
        alpha=config.alpha(name),
        dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )


def _stored(model: nn.Module, config: AdapterConfig) -> Iterator[Tensor]:
    """The parameters of modules stored whole."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if stored_whole(name.rpartition(".")[0], config.modules_to_save):
            yield parameter


def set_trained(trained: bool, parameters: Iterable[Tensor]) -> None:
    """Has parameters require gradients, or not."""
    for parameter in parameters:
        # Neither integers nor what was made in inference mode can be trained.
        if parameter.is_floating_point() and not parameter.is_inference():
            parameter.requires_grad_(trained)


def like(value: Tensor, target: Tensor) -> Tensor:
    """``value`` in the dtype, on the device and sharded as ``target`` is."""
    sharded: Any = target
    if not hasattr(sharded, "full_tensor"):
        return value.to(target)
    from torch.distributed.tensor import distribute_tensor

    local = value.to(device=sharded.to_local().device, dtype=target.dtype)
    # Every rank has read the file: each keeps its shard, and nothing is sent.
    return distribute_tensor(local, sharded.device_mesh, sharded.placements, src_data_rank=None)
