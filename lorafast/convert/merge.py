"""``merge``: adapted layers become plain ones."""

import warnings

from torch import nn

from lorafast.convert import checkpointing, encoders, resizing
from lorafast.convert.fsdp import name_of_sharded
from lorafast.convert.kinds import adapted_layers
from lorafast.convert.places import embeddings_of
from lorafast.convert.targets import replace
from lorafast.nn import AdapterLayer, offload
from lorafast.nn.lora_operand_linear import LoRAOperandLinear, Requantized
from lorafast.nn.plain import move_hooks


def merge(model: nn.Module, *, requantize: bool = False) -> nn.Module:
    """Replaces every adapted layer by a plain one of its merged weight: ``W + scaling · B·A``, of DoRA
    ``m · (W + scaling · B·A) / ‖…‖``.

    The model is changed in place; if it is itself an adapted layer, use what is returned. The layers
    are of the class that was adapted, ``nn.Linear`` as a rule. The sum is rounded to the dtype of the
    weight. Hooks move along. PyTorch's encoders in ``model`` have their fused kernels for inference
    back. A weight that another module shares is no longer shared, and a warning names it. Weights that
    Accelerate has offloaded, to a disk too, are brought in one layer at a time; the merged ones are
    offloaded to the CPU's memory.

    Args:
        model: a model with adapted layers.
        requantize: quantize the merged weights of quantized layers again, in the format and the blocks
            that each had, into ``lorafast.nn.QuantizedLinear`` layers; by default they become dense. A
            warning says how much that lost, of the weights and of what the adapters had learnt.

    Raises:
        ValueError: the model has no adapted layer (with ``requantize`` no quantized one); or a layer's
            adapter has NaN or infinite values or makes some, the layer has no values (meta), is sharded,
            or has hooks that can't move, or nothing quantizes to its format. The message names the
            layer, and the model is unchanged.
    """
    layers = adapted_layers(model, remove_duplicate=False)
    if not layers:
        raise ValueError("the model has no adapted layer to merge")
    if requantize and not any(isinstance(layer, LoRAOperandLinear) for layer in layers.values()):
        raise ValueError("requantize is True, and no adapted layer of the model is quantized")
    sharded = name_of_sharded(model, layers.values())
    if sharded is not None:
        raise ValueError(
            f"{sharded} is sharded by FSDP, which keeps the layers that it was given: merge before "
            "sharding, or save the adapter and load it into a model that isn't"
        )
    shared = _also_used_elsewhere(model, layers)
    # A layer that has two names stays one layer.
    merged: dict[AdapterLayer, nn.Module] = {}
    lost: dict[str, Requantized] = {}
    for name, layer in layers.items():
        if layer in merged:
            continue
        try:
            if requantize and isinstance(layer, LoRAOperandLinear):
                merged[layer], lost[name or "the model"] = layer.to_quantized()
            else:
                merged[layer] = layer.to_plain()
        except ValueError as error:
            raise ValueError(f"{name or 'the model'} can't be merged: {error}") from error
        offload.unwrap(layer, merged[layer])
    if shared:
        warnings.warn(
            "merged weights that other modules share are no longer shared: "
            + ", ".join(shared)
            + _untie_config(model, layers),
            stacklevel=2,
        )
    if lost:
        warnings.warn(_loss(lost), stacklevel=2)
    for layer, plain in merged.items():
        move_hooks(layer, plain)
    checkpointing.undo(model)
    resizing.undo(model)
    model = replace(model, {name: merged[layer] for name, layer in layers.items()})
    encoders.undo(model)
    return model


def _loss(lost: dict[str, Requantized]) -> str:
    """What quantizing again lost, in a sentence."""
    worst = max(lost, key=lambda name: lost[name].error)
    of_update = sorted(one.of_update for one in lost.values())
    middle = of_update[len(of_update) // 2]
    return (
        f"merged weights quantized again: {len(lost)}; the error is at most "
        f"{lost[worst].error:.2g} of a weight ({worst}), and in the median {middle:.2g} of what its "
        "adapter had changed"
    )


def _also_used_elsewhere(model: nn.Module, layers: dict[str, AdapterLayer]) -> list[str]:
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    return [
        f"{name}.{stored}"
        for name, layer in layers.items()
        for stored, tensor in layer.frozen_tensors().items()
        if len(owners.get(id(tensor), ())) > 1
    ]


def _untie_config(model: nn.Module, layers: dict[str, AdapterLayer]) -> str:
    """What to do lest Transformers ties a merged weight again when it loads the saved model."""
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if not tied or not set(layers.values()) & set(embeddings_of(model).values()):
        return ""
    return (
        " (set model.config.tie_word_embeddings = False before saving, or loading ties them again)"
    )
