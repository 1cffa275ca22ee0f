"""LoRA over an embedding: ``y = W[x] + Σ scaling · Aᵀ[x]·Bᵀ``, each adapter added in one product."""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Embedding
from torch import Tensor

from lorafast.core.context import without_autocast
from lorafast.integrations.peft import rules
from lorafast.integrations.peft.adapters import settled


def forward(
    layer: Embedding, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """The layer's output, or None where PEFT serves the call itself."""
    names = active(layer)
    if args or kwargs or rules.why_stock_embedding(layer, names, x):
        return None
    y: Tensor = layer.base_layer(x)
    tokens = x.reshape(-1)
    rows = y.reshape(tokens.numel(), y.shape[-1])  # [M, N]
    with without_autocast(y):
        for name in names:
            rows = _add(layer, name, tokens, rows)
    rows = rows.reshape(y.shape)
    return rows if rows.dtype is y.dtype else rows.to(y.dtype)


def _add(layer: Embedding, name: str, tokens: Tensor, rows: Tensor) -> Tensor:
    lora_A = layer.lora_embedding_A[name]  # [r, V]
    lora_B, scaling = settled(layer.lora_embedding_B[name], layer.scaling[name])  # [N, r]
    padding = layer._modules["base_layer"].padding_idx
    if padding is None and tokens.device.type == "cpu":
        s = lora_A.index_select(1, tokens).t()  # its gradient is not [V, r], to be transposed
    else:
        s = F.embedding(tokens, lora_A.t(), padding)
    dtype = rows.dtype
    if dtype is torch.float16 and lora_B.dtype is not torch.float16:
        dtype = torch.float32  # which what the adapter makes needs, and its gradients
    return torch.addmm(rows.to(dtype), s.to(dtype), lora_B.t().to(dtype), alpha=scaling)


def active(layer: Embedding) -> list[str]:
    """The active adapters that this layer has, in order."""
    return [name for name in layer.active_adapters if name in layer.lora_embedding_A]
