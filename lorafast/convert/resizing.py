"""A Transformers model whose adapted embeddings or output head change their size with the vocabulary."""

from functools import partial
from typing import Any, NamedTuple

from torch import nn

from lorafast.convert.places import embeddings_of
from lorafast.nn import AdapterLayer

_METHOD = "resize_token_embeddings"


class _Adapted(NamedTuple):
    """An adapted layer of one row a token, and where the model has it."""

    place: str
    layer: AdapterLayer


def let_embeddings_resize(model: nn.Module) -> None:
    """``resize_token_embeddings`` of ``model``, and of models in it, resizes adapted layers too.

    Transformers resizes plain ones: it refuses adapted embeddings, and an adapted head when the input
    embeddings are resized already, and of a tied one it changes the weight alone. What an adapter adds
    to a token stays with it; to added tokens it adds nothing.
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


def _adapted(model: nn.Module) -> list[_Adapted]:
    """The adapted ones of the model's input and output embeddings."""
    return [
        _Adapted(place, layer)
        for place, layer in embeddings_of(model).items()
        if isinstance(layer, AdapterLayer)
    ]


def _resize(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own method, which finds plain layers in the place of adapted ones."""
    adapted = _adapted(model)
    plain, take_back = {}, {}
    for place, layer in adapted:
        try:
            plain[place], take_back[place] = layer.to_resize()
        except ValueError as error:
            raise ValueError(f"the {place} embeddings can't be resized: {error}") from error
    try:
        for place, one in plain.items():
            getattr(model, f"set_{place}_embeddings")(one)
        embeddings = getattr(type(model), _METHOD)(model, *args, **kwargs)
        for place in plain:
            take_back[place](getattr(model, f"get_{place}_embeddings")())
    finally:
        for place, layer in adapted:
            getattr(model, f"set_{place}_embeddings")(layer)
    return model.get_input_embeddings() if "input" in plain else embeddings
