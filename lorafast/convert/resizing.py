"""A Transformers model whose adapted output head changes its size with the vocabulary."""

from functools import partial
from typing import Any

from torch import nn

from lorafast.nn import AdapterLayer

_METHOD = "resize_token_embeddings"


def let_heads_resize(model: nn.Module) -> None:
    """``resize_token_embeddings`` of ``model``, and of models in it, resizes an adapted head too.

    Transformers resizes an ``nn.Linear``: it refuses an adapted one when the input embeddings are
    resized already, and of a tied one it changes the weight alone. A row of ``lora_B`` stays with its
    token; those of added tokens are zero.
    """
    for module in model.modules():
        if callable(getattr(module, _METHOD, None)) and _adapted_head(module) is not None:
            setattr(module, _METHOD, partial(_resize, module))


def undo(model: nn.Module) -> None:
    """Undoes ``let_heads_resize``."""
    for module in model.modules():
        method = vars(module).get(_METHOD)
        if isinstance(method, partial) and method.func is _resize:
            delattr(module, _METHOD)


def _adapted_head(model: nn.Module) -> AdapterLayer | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, AdapterLayer) else None


def _resize(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own method, which finds a plain head in the place of the adapted one."""
    head = _adapted_head(model)
    if head is None:
        return getattr(type(model), _METHOD)(model, *args, **kwargs)
    try:
        plain = head.to_resize()
    except ValueError as error:
        raise ValueError(f"the output head can't be resized: {error}") from error
    model.set_output_embeddings(plain)
    try:
        embeddings = getattr(type(model), _METHOD)(model, *args, **kwargs)
        head.take_resized(model.get_output_embeddings())
    finally:
        model.set_output_embeddings(head)
    return embeddings
