"""Where a layer stands in a model: embeddings, places whose adapter would never run, PEFT's layers."""

import contextlib
from collections.abc import Callable, Iterable

from torch import nn

from lorafast.convert.kinds import PLAIN, has_peft_adapter, kind_of
from lorafast.nn import LoRAMultiheadAttention
from lorafast.nn.bottleneck import bottleneck_at

# What torch.compile calls the module that it wraps.
COMPILED = "_orig_mod"


def _named(*classes: str) -> Callable[[nn.Module], bool]:
    return lambda parent: any(cls.__name__ in classes for cls in type(parent).__mro__)


def _is_mamba(parent: nn.Module) -> bool:
    return hasattr(parent, "A_log") and hasattr(parent, "D")


def _adds_bias_apart(parent: nn.Module) -> bool:
    """The attention of BEiT, EVA and Swin V2: one product with a bias put together in each call."""
    separate = getattr(parent, "qkv_bias_separate", False)
    return getattr(parent, "q_bias", None) is not None and not separate


def _is_sliced(parent: nn.Module) -> bool:
    return getattr(parent, "pretraining_tp", 1) > 1 and getattr(parent, "slow_but_exact", False)


def _reads_head(parent: nn.Module) -> bool:
    return bool(getattr(getattr(parent, "config", None), "use_ordered_embeddings", False))


# Parents that read the weight of a child without calling it, always or in one of their modes, and
# which children those are. Transformers', but where another library is named.
_READ_BY_PARENT: tuple[tuple[Callable[[nn.Module], bool], tuple[str, ...]], ...] = (
    (  # PyTorch
        lambda parent: isinstance(parent, (nn.MultiheadAttention, LoRAMultiheadAttention)),
        ("out_proj",),
    ),
    (_is_mamba, ("x_proj", "dt_proj", "out_proj", "conv1d")),
    (_named("WavLMAttention"), ("q_proj", "k_proj", "v_proj", "out_proj")),
    (_named("TDNNLayer"), ("kernel",)),  # x-vector heads of wav2vec 2.0 and its kin
    (_named("DetrMHAttentionMap", "ConditionalDetrMHAttentionMap"), ("k_proj",)),
    (_named("MaskFormerDetrMHAttentionMap"), ("k_proj",)),
    (_named("DabDetrMHAttentionMap"), ("k_linear",)),
    (_named("Gemma3nTextAltUp"), ("correction_coefs",)),
    (_named("LayoutLMv2Encoder"), ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias")),
    (_named("LongcatFlashTopkRouter"), ("classifier",)),
    (_named("LSHSelfAttention"), ("query_key", "value")),  # Reformer, when it generates
    (_named("MobileBertLMPredictionHead"), ("dense", "decoder")),
    (_named("NeoMMEForMaskedLM"), ("unembedding_projection",)),
    (_is_sliced, ("dense", "dense_4h_to_h")),  # Bloom
    (_reads_head, ("lm_head",)),  # Gemma 4's assistants
    (_adds_bias_apart, ("qkv",)),  # timm, Microsoft's own
    (  # torchvision
        _named("ShiftedWindowAttention", "ShiftedWindowAttention3d"),
        ("qkv", "proj"),
    ),
)


def embeddings_of(model: nn.Module) -> dict[str, nn.Module]:
    """The ``input`` and ``output`` embeddings of a Transformers model, those that it has."""
    found = {}
    for place in ("input", "output"):
        with contextlib.suppress(AttributeError, NotImplementedError):  # it has none
            module = getattr(model, f"get_{place}_embeddings")()
            if isinstance(module, nn.Module):
                found[place] = module
    return found


def why_not_called(names: Iterable[str], model: nn.Module, verb: str) -> str | None:
    """The reason for which the model would not call what replaces a layer at its places, or None.

    ``verb``: what is to be done before.
    """
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        if child == COMPILED:
            return f"torch.compile goes on calling the layer that it was given: {verb} it before"
        if any(child in children and reads(parent) for reads, children in _READ_BY_PARENT):
            return f"{type(parent).__name__} reads its weight without calling it"
    return None


def why_not_here(names: Iterable[str], module: nn.Module, model: nn.Module) -> str | None:
    """The reason for which the layer can't be adapted at its places in the model, or None."""
    reason = why_not_called(names, model, "adapt")
    if reason is not None:
        return reason
    if bottleneck_at(module) is not None:
        return "a bottleneck stands at its output, and a layer has adapters of one kind"
    if has_peft_adapter(module):
        return "it has PEFT's adapter (lorafast.accelerate(model) makes that fast)"
    kind = kind_of(module)
    if kind is None:
        return f"it is a {type(module).__name__}, expected an {PLAIN}"
    return kind.layer.why_not_adaptable(module)
