"""Rules of embeddings: as ``rules``, which calls are left to PEFT's own forward, and why."""

from typing import Any

import torch
from peft.tuners.lora import variants as stock
from peft.tuners.lora.dora import DoraEmbeddingLayer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraEmbeddingVariant
from torch import Tensor, nn

from lorafast.integrations.peft import known, rules
from lorafast.nn.adaptable import scales_output

ARGUMENTS = {"adapter_names", "alora_offsets"}
"""What a call may have beside the tokens; PEFT passes over the offsets here."""
_DORA_CHANGED = known.why_changed("embedding's dora")
_MICA: Any = getattr(stock, "MiCAEmbeddingVariant", None)
_MICA_CHANGED = None if _MICA is None else known.why_changed("embedding's MiCA")
_MIXED_CHANGED = known.why_changed("embedding's mixed batch")


def why_stock_embedding(layer: LoraLayer, names: list[str], x: Any = None) -> str | None:
    """Why a ``lora.Embedding`` is left to PEFT, for the input ``x`` if that is given."""
    reason = rules.why_stock(layer, names)
    if reason is not None:
        return reason
    base = layer._modules["base_layer"]
    if type(base) is not nn.Embedding and not _scales(base):
        return f"its base layer is a {type(base).__qualname__}, not exactly an nn.Embedding"
    reason = rules.why_not_plain(base) or rules.why_parallel(base)
    if reason is not None:
        return f"its base layer {reason}"
    if base.max_norm is not None or base.scale_grad_by_freq or base.sparse:
        return "its base layer has max_norm, scale_grad_by_freq or sparse"
    for name in names:
        reason = _why_not_adapter(layer, name, base.weight)
        if reason is not None:
            return f"adapter {name!r} {reason}"
    if x is None:
        return None
    if type(x) not in rules.PLAIN or x.device != base.weight.device:
        return "its input is not a plain tensor where its weight is"
    return rules.SPARSE if x.layout is not torch.strided or x.is_nested else None


def _scales(base: Any) -> bool:
    """Whether it is an embedding whose forward multiplies by its ``embed_scale``, as Gemma's.

    A class is looked at once, outside compiled code: ``accelerate`` does so.
    """
    kind = type(base)
    if not isinstance(base, nn.Embedding):
        return False
    known_forward, scales = _LOOKED_AT.get(kind, (None, False))
    if known_forward is not kind.forward and not torch.compiler.is_compiling():
        scales = scales_output(base)
        _LOOKED_AT[kind] = kind.forward, scales
    return scales


_LOOKED_AT: dict[type[nn.Module], tuple[Any, bool]] = {}
"""Classes of embeddings: the forward that was looked at, and what was found."""


def _why_not_adapter(layer: LoraLayer, name: str, weight: Tensor) -> str | None:
    lora_A = layer.lora_embedding_A._parameters.get(name)
    lora_B = layer.lora_embedding_B._parameters.get(name)
    if type(lora_A) not in rules.PLAIN or type(lora_B) not in rules.PLAIN:
        return f"has a {type(lora_A).__name__}, not a plain tensor"
    if lora_A.layout is not torch.strided or lora_B.layout is not torch.strided:
        return f"is {lora_A.layout} and {lora_B.layout}"
    r = lora_A.shape[0]
    if lora_A.shape != (r, weight.shape[0]) or lora_B.shape != (weight.shape[1], r):
        return f"has the shapes {list(lora_A.shape)} and {list(lora_B.shape)}"
    if not {weight.dtype, lora_A.dtype, lora_B.dtype} <= set(rules.FLOATS):
        return f"is {lora_A.dtype}, the weight {weight.dtype}"
    if not weight.device == lora_A.device == lora_B.device:
        return f"is on {lora_A.device}, the weight on {weight.device}"
    scaling = layer.scaling[name]
    if isinstance(scaling, Tensor) and scaling.dim() > 0:
        return f"has a scaling of the shape {list(scaling.shape)}"
    variant = layer.lora_variant.get(name)
    return None if variant is None else _why_not_variant(layer, name, variant, weight)


def _why_not_variant(layer: LoraLayer, name: str, variant: Any, weight: Tensor) -> str | None:
    if _is_mica(variant):
        return _MICA_CHANGED and f"is of MiCA, and {_MICA_CHANGED}"
    if type(variant) is not DoraEmbeddingVariant:
        return f"is of another kind: {type(variant).__name__}"
    if _DORA_CHANGED is not None:
        return f"is of DoRA, and {_DORA_CHANGED}"
    magnitude = layer.lora_magnitude_vector[name]
    if type(magnitude) is not DoraEmbeddingLayer:
        return f"has a magnitude that is a {type(magnitude).__qualname__}"
    reason = rules.why_not_plain(magnitude)
    if reason is not None:
        return f"has a magnitude that {reason}"
    if magnitude.weight.shape != weight.shape[1:] or magnitude.weight.device != weight.device:
        return "has a magnitude of another shape or device"
    return None


def _is_mica(variant: Any) -> bool:
    """Whether it is MiCA's, which computes what plain LoRA does: its B is frozen."""
    return _MICA is not None and type(variant) is _MICA


def is_dora(layer: LoraLayer, name: str) -> bool:
    """Whether an adapter that is served has a magnitude."""
    return type(layer.lora_variant.get(name)) is DoraEmbeddingVariant


def why_stock_mixed(layer: LoraLayer, names: Any, x: Any) -> str | None:
    """Why a mixed batch, ``names`` of its elements' adapters, is left to PEFT; ``x`` as it comes."""
    reason = _MIXED_CHANGED or rules.why_no_mixed_batch(names, x)
    if reason is not None:
        return reason
    for name in dict.fromkeys(names):
        if name in layer.lora_variant and not _is_mica(layer.lora_variant[name]):
            return rules.OTHER_THAN_PLAIN.format(name)
    return None
