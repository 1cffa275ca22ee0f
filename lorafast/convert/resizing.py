"""A Transformers model whose adapted output head changes its size with the vocabulary."""

from functools import partial
from typing import Any

import torch
from torch import nn

from lorafast.nn import LoRALinear
from lorafast.operands import Operand

_METHOD = "resize_token_embeddings"


def let_heads_resize(model: nn.Module) -> None:
    """``resize_token_embeddings`` of ``model``, and of models in it, resizes an adapted head too.

    Transformers resizes an ``nn.Linear``: it refuses a ``LoRALinear`` when the input embeddings are
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


def _adapted_head(model: nn.Module) -> LoRALinear | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, LoRALinear) else None


def _resize(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own method, which finds a plain head in the place of the adapted one."""
    head = _adapted_head(model)
    if head is None:
        return getattr(type(model), _METHOD)(model, *args, **kwargs)
    weight = head.operand()
    if isinstance(weight, Operand):
        raise ValueError(
            f"the output head is stored as {weight.format}, which can't be resized: resize the model "
            "before it is stored so"
        )
    linear = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    linear.weight = head.weight
    linear.register_parameter("bias", head.bias)
    model.set_output_embeddings(linear)
    try:
        embeddings = getattr(type(model), _METHOD)(model, *args, **kwargs)
        _take_over(head, model.get_output_embeddings())
    finally:
        model.set_output_embeddings(head)
    return embeddings


def _take_over(head: LoRALinear, linear: nn.Linear) -> None:
    """Gives ``head`` the parameters of ``linear``, and ``lora_B`` as many rows.

    They are trained, or frozen, as the head's were: a tied weight is the input embedding's too.
    """
    assert isinstance(linear.weight, nn.Parameter)
    rows = linear.weight.shape[0]
    linear.weight.requires_grad_(head.weight.requires_grad)
    if linear.bias is not None and head.bias is not None:
        linear.bias.requires_grad_(head.bias.requires_grad)
    head.weight = linear.weight
    head.bias = linear.bias
    if rows == head.out_features:
        return
    head.out_features = rows
    old = head.lora_B
    with torch.no_grad():
        lora_B = old.new_zeros((rows, head.r))
        kept = min(rows, old.shape[0])
        lora_B[:kept] = old[:kept]
    head.lora_B = nn.Parameter(lora_B, requires_grad=old.requires_grad)
    if head.merged:
        head.merge()
