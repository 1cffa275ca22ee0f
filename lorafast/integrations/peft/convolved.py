"""LoRA's relatives over convolutions: the rules, and ``low_rank``'s kinds as one LoRA convolution."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lorafast import functional
from lorafast.integrations.peft import conv_rules, low_rank, rules
from lorafast.integrations.peft.low_rank import Kind, Part


def why_stock(layer: Any, kind: Kind) -> str | None:
    """Why a convolution of ``kind`` is left to PEFT, whatever its input, as the end of a sentence."""
    parts = kind.parts(layer)
    return why_stock_parts(layer, parts) or _why_not_kind(layer, parts, kind)


def why_stock_parts(layer: Any, parts: Sequence[Part]) -> str | None:
    """The same of what every kind must have: a known base layer, plain tensors of one dtype."""
    base: Any = layer._modules["base_layer"]
    reason = rules.why_stock(layer, parts) or conv_rules.why_not_base(base)
    if reason is not None:
        return reason
    if base.padding_mode != "zeros":
        return (
            f"its padding_mode is {base.padding_mode!r}, and PEFT pads with zeros for the adapter"
        )
    return low_rank.why_not_tensors(parts)


def _why_not_kind(layer: Any, parts: Sequence[Part], kind: Kind) -> str | None:
    if layer._modules["base_layer"].groups > 1:
        return "it is a convolution in groups"
    if len(parts) > 1 and any(low_rank.drops(part.dropout) for part in parts):
        return "several adapters with dropout are active"
    return low_rank.why_none_fits(layer, parts, kind)


def why_not_input(layer: Any, parts: Sequence[Part], x: Any) -> str | None:
    """Why a layer that ``why_stock_parts`` has nothing against is left to PEFT for this input."""
    base: Any = layer._modules["base_layer"]
    tensors = [tensor for part in parts for tensor in part.tensors.values()]
    reason = conv_rules.why_not_input(layer, tensors[0].dtype, base, x)
    if reason is not None:
        return reason
    if any(tensor.device != x.device for tensor in (*tensors, base.weight)):
        return f"its input is on {x.device}, its weight or an adapter isn't"
    return None


def forward(layer: Any, x: Tensor, kind: Kind) -> Tensor | None:
    """The layer's output, or None where PEFT serves the call itself."""
    parts = kind.parts(layer)
    if why_stock_parts(layer, parts) is not None or _why_not_kind(layer, parts, kind) is not None:
        return None
    if why_not_input(layer, parts, x) is not None:
        return None
    base: Any = layer._modules["base_layer"]
    weight: Tensor = base._parameters["weight"]
    N, K = weight.shape[0], weight[0].numel()
    terms = [term for part in parts if (term := kind.term(layer, part, N, K, False)) is not None]
    if not terms:
        y: Tensor = base(x)
    else:
        A, B, scaling = low_rank.as_one([term.folded() for term in terms])
        y = functional.lora_conv(
            x, weight, A.view(-1, *weight.shape[1:]), B.reshape(N, -1, *[1] * (weight.dim() - 2)),
            scaling, base._parameters["bias"], stride=base.stride, padding=base.padding,
            dilation=base.dilation, dropout_p=terms[0].dropout_p,
        )  # fmt: skip
    return y.to(x.dtype) if kind.as_input else y


def same_along(values: Any) -> bool:
    """Whether stride, padding or a kernel is the same number along every axis."""
    return not isinstance(values, str) and len(set(values)) == 1
