"""LoRA over an embedding: which of PEFT's calls are served fast, and by what."""

from typing import Any

from peft.tuners.lora.layer import Embedding
from torch import Tensor

from lorafast.integrations.peft import rules
from lorafast.ops.lora_embedding import add_low_rank


def forward(
    layer: Embedding, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """The layer's output, or None where PEFT serves the call itself."""
    names = active(layer)
    if args or kwargs or rules.why_stock_embedding(layer, names, x):
        return None
    y: Tensor = layer.base_layer(x)
    dtype, padding_idx = y.dtype, layer._modules["base_layer"].padding_idx
    for name in names:
        lora_A, lora_B = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        y = add_low_rank(y, x, lora_A, lora_B, layer.scaling[name], padding_idx)
    return y.to(dtype)


def active(layer: Embedding) -> list[str]:
    """The active adapters that this layer has, in order."""
    return [name for name in layer.active_adapters if name in layer.lora_embedding_A]
