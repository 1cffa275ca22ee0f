"""A Transformers model whose adapted embeddings or output head change their size with the vocabulary."""

from functools import partial
from typing import Any

from torch import nn

from lorafast.convert.kinds import adapted_layers
from lorafast.convert.places import embeddings_of
from lorafast.convert.targets import replace
from lorafast.nn import AdapterLayer, inactive

_METHOD = "resize_token_embeddings"


def let_embeddings_resize(model: nn.Module) -> None:
    """``resize_token_embeddings`` of ``model``, and of models in it, resizes adapted layers too.

    Transformers resizes plain ones: it refuses adapted embeddings, and an adapted head when the input
    embeddings are resized already, and of a tied one it changes the weight alone. BART and T5 put the
    new embeddings in the place of their encoder's and decoder's. What an adapter adds to a token stays
    with it; to added tokens it adds nothing.
    """
    for module in model.modules():
        if callable(getattr(module, _METHOD, None)) and _adapted(module):
            setattr(module, _METHOD, partial(_resize, module))


def undo(model: nn.Module) -> None:
    """Undoes ``let_embeddings_resize``."""
    for module in model.modules():
        method = vars(module).get(_METHOD)
        if isinstance(method, partial) and method.func is _resize:
            delattr(module, _METHOD)


def _adapted(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapted ones of the model's input and output embeddings, and of what shares their weights."""
    places = list(embeddings_of(model).values())
    weights = {id(tensor) for place in places for tensor in place.parameters(recurse=False)}
    return {
        name: layer
        for name, layer in adapted_layers(model, remove_duplicate=False).items()
        if layer in places or any(id(t) in weights for t in layer.frozen_tensors().values())
    }


def _resize(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own method, which finds plain layers in the place of adapted ones."""
    adapted, places = _adapted(model), embeddings_of(model)
    plain, take_back = {}, {}
    for name, layer in adapted.items():
        if layer in plain:
            continue
        try:
            inactive.check_alone(layer)
            plain[layer], take_back[layer] = layer.to_resize()
        except ValueError as error:
            place = next((f"the {p} embeddings" for p, one in places.items() if one is layer), name)
            raise ValueError(f"{place} can't be resized: {error}") from error
    replace(model, {name: plain[layer] for name, layer in adapted.items()})
    try:
        embeddings = getattr(type(model), _METHOD)(model, *args, **kwargs)
        names = {layer: name for name, layer in adapted.items()}
        for layer, name in names.items():
            take_back[layer](model.get_submodule(name))
    finally:
        # By name: the model's own setter may put one layer into several places.
        replace(model, dict(adapted))
    return model.get_input_embeddings() if places.get("input") in names else embeddings
