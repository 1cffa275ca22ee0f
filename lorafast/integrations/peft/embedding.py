"""LoRA over an embedding: which of PEFT's calls are served fast, and by what."""

from typing import Any

import torch
from peft.tuners.lora.layer import Embedding
from torch import Tensor

from lorafast.core.context import without_autocast
from lorafast.integrations.peft import by_element, embedding_rules
from lorafast.operands import kept_transposed
from lorafast.ops import weight_norm
from lorafast.ops.lora_embedding import add_low_rank, shrunk


def forward(
    layer: Embedding, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """The layer's output, or None where PEFT serves the call itself."""
    if args or kwargs.keys() - embedding_rules.ARGUMENTS:
        return None
    if kwargs.get("adapter_names") is not None:
        return _mixed(layer, x, kwargs["adapter_names"])
    names = active(layer)
    if embedding_rules.why_stock_embedding(layer, names, x) is not None:
        return None
    embed_scale = layer._get_embed_scale()
    y: Tensor = layer.base_layer(x)
    dtype, padding_idx = y.dtype, layer._modules["base_layer"].padding_idx
    for name in names:
        lora_A, lora_B = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        y = add_low_rank(y, x, lora_A, lora_B, _scaling(layer, name, embed_scale), padding_idx)
        if embedding_rules.is_dora(layer, name):
            y = y * _dora_scale(layer, name)
    return y.to(dtype)


def active(layer: Embedding) -> list[str]:
    """The active adapters that this layer has, in order."""
    return [name for name in layer.active_adapters if name in layer.lora_embedding_A]


def _scaling(layer: Embedding, name: str, embed_scale: Tensor | None) -> Any:
    """The scaling of an adapter, times what the base layer multiplies by, in PEFT's dtype for that."""
    scaling = layer.scaling[name]
    if embed_scale is None:
        return scaling
    dtype = layer.lora_embedding_B[name].dtype
    wide = torch.promote_types(dtype, torch.float32)
    return embed_scale.to(dtype).reshape(()).to(wide) * scaling


def _dora_scale(layer: Embedding, name: str) -> Tensor:
    """``m / ‖W + scaling · (B·A)ᵀ‖`` of the columns ``[N]``, of a norm without a gradient.

    PEFT takes the norm without ``embed_scale``.
    """
    weight = layer._modules["base_layer"].weight
    lora_A, lora_B = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    magnitude: Tensor = layer.lora_magnitude_vector[name].weight
    with without_autocast(weight):
        norm = weight_norm(kept_transposed(weight), lora_A, lora_B, layer.scaling[name])
    return magnitude / norm


def _mixed(layer: Embedding, x: Tensor, rows: Any) -> Tensor | None:
    """The output of a batch whose elements have adapters of their own, ``rows`` by name."""
    if embedding_rules.why_stock_mixed(layer, rows, x) is not None:
        return None
    elements = by_element.elements_of(rows, list(layer.lora_embedding_A))
    if embedding_rules.why_stock_embedding(layer, list(elements), x) is not None:
        return None
    embed_scale = layer._get_embed_scale()
    y: Tensor = layer.base_layer(x)
    padding_idx = layer._modules["base_layer"].padding_idx
    batch, T = len(x), x.shape[1:].numel()

    def shrink(name: str, tokens: Tensor) -> Tensor:
        s = shrunk(tokens, layer.lora_embedding_A[name], padding_idx)
        return s.view(len(tokens), T, s.shape[1]).transpose(1, 2)

    every_B = {
        name: layer.lora_embedding_B[name] * _scaling(layer, name, embed_scale) for name in elements
    }
    s = by_element.shrunk(x, elements, shrink).transpose(1, 2)  # [batch, T, r]
    B = by_element.expanding(elements, batch, every_B).transpose(1, 2)  # [batch, r, N]
    return by_element.added(y.reshape(batch, T, y.shape[-1]), s, B).view(y.shape)
