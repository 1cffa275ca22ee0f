"""LoRA over multi-head attention: which of PEFT's calls are served fast, and how."""

from typing import Any

import torch
from torch import Tensor

from lorafast.integrations.peft import attention_rules
from lorafast.integrations.peft.adapters import active, settled
from lorafast.nn.attention import Heads, Projection, multihead_attention
from lorafast.nn.lora_attention import OUT_PROJ_TIMES

ARGUMENTS = (
    "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal",
)  # fmt: skip
"""What ``nn.MultiheadAttention`` takes beside the query, in its order."""

Result = tuple[Tensor, Tensor | None]


def forward(
    layer: Any, query: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Result | None:
    """The layer's result, or None where PEFT serves the call itself."""
    given = dict(zip(ARGUMENTS, args, strict=False))
    if len(args) > len(ARGUMENTS) or given.keys() & kwargs.keys():
        return None
    given |= kwargs
    if given.keys() - set(ARGUMENTS) or not given.keys() >= {"key", "value"}:
        return None
    if _is_nested(layer, query, given):
        return _padded(layer, query)
    adapters = active(layer)
    if attention_rules.why_stock_attention(layer, adapters) is not None:
        return None
    base = layer._modules["base_layer"]
    heads = heads_of(base)
    if attention_rules.why_stock_input(layer, adapters[0], heads, query, given) is not None:
        return None
    y, weights = multihead_attention(
        query,
        given.pop("key"),
        given.pop("value"),
        *_projections(base, adapters[0]),
        heads,
        **given,
    )
    return y.to(query.dtype), None if weights is None else weights.to(query.dtype)


def _is_nested(layer: Any, query: Any, given: dict[str, Any]) -> bool:
    """Whether it is self-attention over a nested tensor, as ``nn.TransformerEncoder`` calls it.

    Outside inference PyTorch refuses it, and an encoder makes one there too: it knows of no adapter.
    """
    return (
        type(query) is Tensor
        and query.is_nested
        and query.layout is torch.strided
        and query.dim() == 3
        and layer._modules["base_layer"].batch_first
        and given["key"] is query
        and given["value"] is query
        and given.get("key_padding_mask") is None
        and given.get("attn_mask") is None
        and not given.get("need_weights", True)
    )


def _padded(layer: Any, query: Tensor) -> Result:
    """The result for a nested tensor, by way of a padded one."""
    kept = torch.ones_like(query).to_padded_tensor(0.0)[..., 0] != 0
    x = query.to_padded_tensor(0.0)
    padding = ~kept & kept.any(dim=1, keepdim=True)  # lest a sequence of nothing is NaN
    y, _ = type(layer).forward(layer, x, x, x, padding, need_weights=False)
    return torch._nested_tensor_from_mask(y, kept, mask_check=False), None


def heads_of(base: Any) -> Heads:
    """What the attention is beside its projections."""
    return Heads(
        base.num_heads, base.batch_first, base.dropout if base.training else 0.0, base.bias_k,
        base.bias_v, base.add_zero_attn,
    )  # fmt: skip


def _projections(base: Any, adapter: Any) -> tuple[Projection, Projection]:
    """``in_proj`` and ``out_proj`` without dropout, which PEFT's layer has none of.

    PEFT adds the change of ``out_proj`` twice and differentiates it once.
    """
    p = base._parameters
    A, B = adapter.lora_A._parameters["weight"], adapter.lora_B._parameters["weight"]
    in_proj = Projection(
        p["in_proj_weight"], p["in_proj_bias"], A, *settled(B, adapter.scaling)
    )  # fmt: skip
    out = base._modules["out_proj"]
    adapter = active(out)[0]
    A, B = (
        _seen(one._parameters["weight"], 1 / OUT_PROJ_TIMES)
        for one in (adapter.lora_A, adapter.lora_B)
    )
    p = out._modules["base_layer"]._parameters
    twice = settled(B, OUT_PROJ_TIMES * adapter.scaling)
    return in_proj, Projection(p["weight"], p["bias"], A, *twice)


def _seen(tensor: Tensor, share: float) -> Tensor:
    """The same values, of whose gradient a share comes through; exact for finite values."""
    if not (tensor.requires_grad and torch.is_grad_enabled()):
        return tensor
    values = tensor.detach()
    return values + (tensor - values) * share
