"""``merge``: LoRA layers become plain linear layers."""

import warnings

from torch import nn

from lorafast.convert import checkpointing, resizing
from lorafast.convert.targets import replace
from lorafast.nn import LoRALinear
from lorafast.nn.lora_linear import move_hooks


def merge(model: nn.Module) -> nn.Module:
    """Replaces every ``LoRALinear`` by an ``nn.Linear`` of weight ``W + scaling · B·A``.

    The model is changed in place; if it is itself a ``LoRALinear``, use what is returned. The sum is
    rounded to the dtype of the weight. Hooks move along. A weight that another module shares is no
    longer shared, and a warning names it.

    Raises:
        ValueError: the model has no ``LoRALinear``.
    """
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LoRALinear)
    }
    if not layers:
        raise ValueError("the model has no LoRALinear to merge")
    shared = _also_used_elsewhere(model, layers)
    if shared:
        warnings.warn(
            "merged weights that other modules share are no longer shared: "
            + ", ".join(shared)
            + _untie_config(model, layers),
            stacklevel=2,
        )
    # A layer that has two names stays one layer.
    merged = {layer: layer.to_linear() for layer in dict.fromkeys(layers.values())}
    for layer, linear in merged.items():
        move_hooks(layer, linear)
    checkpointing.undo(model)
    resizing.undo(model)
    return replace(model, {name: merged[layer] for name, layer in layers.items()})


def _also_used_elsewhere(model: nn.Module, layers: dict[str, LoRALinear]) -> list[str]:
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    return [f"{name}.weight" for name, layer in layers.items() if len(owners[id(layer.weight)]) > 1]


def _untie_config(model: nn.Module, layers: dict[str, LoRALinear]) -> str:
    """What to do lest Transformers ties a merged head again when it loads the saved model."""
    config = getattr(model, "config", None)
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if head not in layers.values() or not getattr(config, "tie_word_embeddings", False):
        return ""
    return (
        " (set model.config.tie_word_embeddings = False before saving, or loading ties them again)"
    )
