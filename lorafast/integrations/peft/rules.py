"""Rules: which calls of PEFT's adapter layers are left to PEFT's own forward, and why.

Each function returns a reason, as the end of a sentence, or None if the call can be served fast. A thing
that a rule doesn't know is a reason. The rules run in every forward, so they compute nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant, DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as every_module
from transformers.pytorch_utils import Conv1D

from lorafast.core.context import autocast_enabled, transforms_active
from lorafast.integrations.peft import known, quantized, variants
from lorafast.integrations.peft.adapters import Adapter
from lorafast.integrations.peft.quantized import Frozen
from lorafast.operands import Operand, Weight

_LINEAR: dict[Any, str] = {
    nn.Linear: "torch.nn.modules.linear",
    Conv1D: "transformers.pytorch_utils",
}
"""The base layers that are served, and the module in which their forward is defined."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_DORA_CHANGED = known.why_changed("dora")
_ALORA_CHANGED = known.why_changed("alora")
_CHANGED = {kind: known.why_changed(name) for kind, name in variants.KINDS.items()}
INACTIVE = "none of its adapters is active"
OTHER_THAN_PLAIN = "adapter {!r} of a mixed batch is of another kind than plain LoRA"
SPARSE = "its input is sparse or nested"
PLAIN = (Tensor, nn.Parameter)
"""The types of tensors that are read."""


def why_stock(layer: BaseTunerLayer, active: Sequence[object]) -> str | None:
    """Why ``layer`` with these adapters is left to PEFT, whatever its kind and input."""
    if layer._disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        names = ", ".join(map(repr, layer.merged_adapters))
        return f"adapters are merged into its weight: {names}"
    if (
        every_module._global_forward_hooks
        or every_module._global_forward_pre_hooks
        or every_module._global_backward_hooks
        or every_module._global_backward_pre_hooks
    ):
        return "hooks are registered for all modules"
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return "what is exported must run where lorafast isn't installed"
    if forward_ad._current_level >= 0:
        return "it is differentiated in forward mode"
    return None if active else INACTIVE


def why_stock_linear(layer: LoraLayer, adapters: list[Adapter]) -> str | None:
    """Why a ``lora.Linear`` is left to PEFT, whatever its input."""
    reason = why_stock(layer, adapters)
    if reason is not None:
        return reason
    base: nn.Module = layer._modules["base_layer"]
    reason = why_not_base(base)
    if reason is not None:
        return reason
    for adapter in adapters:
        variant = layer.lora_variant.get(adapter.name)
        if variant is not None:
            reason = _why_not_variant(layer, adapter, variant, adapters)
        reason = reason or why_not_adapter(adapter, type(variant) is variants.BD)
        if reason is not None:
            return reason
    return None


def why_not_base(base: nn.Module) -> str | None:
    """Why a layer that is adapted can't be read in place of calling it, or isn't known."""
    if quantized.is_one(base):
        reason = why_called(base) or _why_no_bias(base) or why_parallel(base)
        return quantized.why_not(base) if reason is None else f"its base layer {reason}"
    if type(base) not in _LINEAR:
        return f"its base layer is a {_type(base)}, not exactly an nn.Linear or a Conv1D"
    for kind in (type(base), nn.Linear):
        forward = kind.forward
        if forward.__module__ != _LINEAR[kind] or hasattr(forward, "__wrapped__"):
            return f"the forward of {kind.__qualname__} was replaced"
    reason = why_not_read(base)
    if reason is None and base.weight.dtype is torch.float64:
        reason = "is in torch.float64"  # which its input is then
    return reason and f"its base layer {reason}"


def why_not_adapter(adapter: Adapter, blocks: bool = False) -> str | None:
    """Why an adapter of two linear layers can't be read in place of calling them.

    ``blocks``: one of them may be BD-LoRA's.
    """
    name, lora_A, lora_B, dropout, scaling = adapter
    for factor in (lora_A, lora_B):
        if type(factor) is nn.Linear or (blocks and type(factor) is variants.BLOCKS):
            continue
        return f"adapter {name!r} is made of {_type(lora_A)} and {_type(lora_B)}"
    if isinstance(scaling, Tensor) and scaling.dim() > 0:
        return f"the scaling of adapter {name!r} has the shape {list(scaling.shape)}"
    reason = why_not_dropout(name, dropout)
    if reason is not None:
        return reason
    reason = why_not_plain(lora_A) or why_not_plain(lora_B)
    if reason is None:
        reason = _why_no_bias(lora_B) if type(lora_B) is nn.Linear else None
    if reason is None and blocks:
        reason = _why_no_blocks(lora_A) or _why_no_blocks(lora_B)
    return reason and f"adapter {name!r} {reason}"


def why_not_dropout(name: str, dropout: nn.Module) -> str | None:
    """Why the dropout of the adapter of this name can't be left out of the call."""
    if type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
        return f"the dropout of adapter {name!r} is a {_type(dropout)}"
    if type(dropout) is nn.Dropout and (dropout.inplace or type(dropout.p) not in (float, int)):
        return f"the dropout of adapter {name!r} changes its input, or has a probability of its own kind"
    reason = why_called(dropout)
    return reason and f"adapter {name!r} {reason}"


def _why_no_blocks(factor: Any) -> str | None:
    """Why A or B isn't whole blocks, if it is BD-LoRA's."""
    if type(factor) is not variants.BLOCKS:
        return None
    shape, n = factor._parameters["weight"].shape, factor.nblocks
    if type(n) is int and n > 0 and len(shape) == 2 and shape[0] % n == 0:
        return None
    return f"has {n} blocks in a weight of the shape {list(shape)}"


def _why_not_variant(
    layer: LoraLayer, adapter: Adapter, variant: Any, adapters: list[Adapter]
) -> str | None:
    kind, name = type(variant), adapter.name
    if kind is ALoraLinearVariant:
        return _ALORA_CHANGED or _why_beside_alora(layer, name, adapters)
    if kind is DoraLinearVariant:
        return _DORA_CHANGED or _why_not_dora(layer, adapter)
    if kind not in variants.KINDS:
        return f"adapter {name!r} is of another kind: {kind.__name__}"
    if _CHANGED[kind] is not None:
        return _CHANGED[kind]
    reason = None
    if kind is variants.KASA:
        reason = _why_not_kasa(layer, adapter)
    elif kind is variants.MONTE:
        reason = _why_not_monte(layer, adapter)
    elif variants.is_velora(layer, name):
        reason = _why_not_velora(layer, adapter)
    return reason and f"adapter {name!r}, of {variants.KINDS[kind]}, {reason}"


def _why_beside_alora(layer: LoraLayer, name: str, adapters: list[Adapter]) -> str | None:
    for other in adapters:
        if is_dora(layer, other.name) or variants.is_velora(layer, other.name):
            kind = "DoRA" if is_dora(layer, other.name) else variants.KINDS[variants.VELORA]
            return f"adapter {other.name!r}, of {kind}, is active together with aLoRA's {name!r}"
    return None


def _why_not_dora(layer: LoraLayer, adapter: Adapter) -> str | None:
    name = adapter.name
    if adapter.lora_B.bias is not None:
        return f"adapter {name!r} is of DoRA with lora_bias"
    magnitude = layer.lora_magnitude_vector[name]
    if type(magnitude) is not DoraLinearLayer:
        return f"the magnitude of adapter {name!r} is a {_type(magnitude)}"
    reason = why_not_plain(magnitude)
    return reason and f"the magnitude of adapter {name!r} {reason}"


def _why_not_kasa(layer: Any, adapter: Adapter) -> str | None:
    if adapter.name in layer._lora_kasa_truncation_deferred:
        return "has yet to truncate the weight, in PEFT's first forward"
    diagonal = layer._modules["lora_diag"]._parameters.get(adapter.name)
    lora_B = adapter.lora_B._parameters["weight"]
    if type(diagonal) not in PLAIN or diagonal.device != lora_B.device:
        return f"has a {type(diagonal).__name__} for its diagonal, or elsewhere than its factors"
    fits = diagonal.shape == lora_B.shape[1:] and diagonal.layout is torch.strided
    return None if fits else f"has a diagonal of the shape {list(diagonal.shape)}"


def _why_not_monte(layer: Any, adapter: Adapter) -> str | None:
    if not layer.training:
        return None
    sampler = layer._modules["lora_monteclora_sampler"]._modules.get(adapter.name)
    if sampler is None:
        return "has yet to make its sampler, in PEFT's first forward"
    if torch.compiler.is_compiling():
        return "draws from a list of the host's, which compiled code would compile anew for each sample"
    if sampler.std_prior.dtype is not adapter.lora_A._parameters["weight"].dtype:
        return f"has a sampler of {sampler.std_prior.dtype}"
    return None


def _why_not_velora(layer: Any, adapter: Adapter) -> str | None:
    if torch.compiler.is_compiling() or transforms_active():
        return "has a backward of its own, which is traced or transformed as PEFT has it"
    name, A = adapter.name, adapter.lora_A._parameters["weight"]
    vector = layer._modules["lora_velora_embed"]._buffers.get(name)
    groups = layer.lora_velora_num_groups[name]
    if type(vector) is not Tensor or vector.device != A.device:
        return f"has a {type(vector).__name__} for its vector, or elsewhere than its factors"
    fits = vector.shape == (-(-A.shape[-1] // groups),)
    return None if fits else f"has a vector of the shape {list(vector.shape)}, in {groups} groups"


def is_alora(layer: LoraLayer, name: str) -> bool:
    """Whether an adapter of the layer is one of aLoRA."""
    return type(layer.lora_variant.get(name)) is ALoraLinearVariant


def is_dora(layer: LoraLayer, name: str) -> bool:
    """Whether an adapter of the layer is one of DoRA."""
    return type(layer.lora_variant.get(name)) is DoraLinearVariant


def why_not_plain(module: nn.Module) -> str | None:
    """Why the parameters of ``module`` can't be read in place of calling it."""
    parameters = module._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None:
        return "has no weight of its own"
    for parameter in (weight,) if bias is None else (weight, bias):
        if type(parameter) is not nn.Parameter and type(parameter) is not Tensor:
            kind = type(parameter).__name__
            hint = " (FSDP's are whole in its forward)" if kind == "DTensor" else ""
            return f"has a {kind}, not a plain tensor{hint}"
        if parameter.is_meta:
            return "is on the meta device"
        if parameter.layout is not torch.strided:
            return f"is {parameter.layout}"
    return why_called(module)


def why_not_read(module: nn.Module) -> str | None:
    """Why the weight and the bias of ``module`` can't be read in place of calling it."""
    return why_not_plain(module) or _why_no_bias(module) or why_parallel(module)


def _why_no_bias(module: nn.Module) -> str | None:
    return None if "bias" in module._parameters else "has no bias of its own, not even None"


def why_called(module: nn.Module) -> str | None:
    """Why a call of ``module`` can't be left out: somebody would miss it."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "has hooks"
    own = module.__dict__
    if "_hf_hook" in own:
        return "has a hook of accelerate's"
    if "forward" in own:
        return "has a forward of its own"
    return None


def why_parallel(base: nn.Module) -> str | None:
    """Why a base layer is one of several devices' parts."""
    own = base.__dict__
    parallel = "_hf_tp_plan" in own or "_hf_device_mesh" in own
    return "has a tensor parallel plan" if parallel else None


def why_stock_input(
    layer: LoraLayer, adapters: list[Adapter], weight: Weight, x: Any
) -> str | None:
    """Why a ``lora.Linear`` is left to PEFT for this input; ``weight [N, K]``."""
    first = adapters[0].lora_A._parameters["weight"]
    assert first is not None
    adapter_dtype, (N, K) = first.dtype, weight.shape
    reason = why_not_input(layer, adapter_dtype, weight, x)
    if reason is not None:
        return reason
    device = x.device
    for name, lora_A, lora_B, *_ in adapters:
        A: Any = lora_A._parameters["weight"]
        B: Any = lora_B._parameters["weight"]
        of_A, of_B = A.shape, B.shape
        if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
            of_A, of_B = variants.shape_of(lora_A), variants.shape_of(lora_B)
        r = of_A[0]
        if of_A != (r, K) or of_B != (N, r) or r == 0:
            return f"adapter {name!r} has the shapes {list(of_A)} and {list(of_B)}"
        if A.dtype is not adapter_dtype or B.dtype is not adapter_dtype:
            return f"adapter {name!r} is not {adapter_dtype} throughout, as the first one"
        if A.device != device or B.device != device:
            return f"its input is on {device}, adapter {name!r} is elsewhere"
    if layer.lora_variant:
        for adapter in adapters:
            if is_dora(layer, adapter.name):
                magnitude = layer.lora_magnitude_vector[adapter.name].weight
                if x.dim() < 2 or magnitude.shape != (N,) or magnitude.device != device:
                    return "DoRA of a single row, or with a magnitude of another shape or device"
    return None


def why_not_input(layer: Any, adapter_dtype: torch.dtype, weight: Weight, x: Any) -> str | None:
    """Why a linear layer with adapters of this dtype is left to PEFT for this input."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"its input is a {type(x).__name__}, not a plain tensor"
    if x.layout is not torch.strided or x.is_nested:
        return SPARSE
    K = weight.shape[1]
    if x.dim() == 0 or x.shape[-1] != K:
        return f"its input has shape {list(x.shape)}, expected [..., {K}]"
    dtype = x.dtype
    if dtype not in FLOATS or (adapter_dtype is not dtype and adapter_dtype is not torch.float32):
        return f"its input is {dtype}, its adapters are {adapter_dtype}"
    if weight.device != x.device:
        return f"its input is on {x.device}, its weight on {weight.device}"
    base: nn.Module = layer._modules["base_layer"]
    reason = (
        quantized.why_not_input(base, x)
        if isinstance(weight, Operand)
        else _why_not_dtypes(weight, base._parameters["bias"], x)
    )
    if reason is not None:
        return reason
    cast = getattr(
        layer, "cast_input_dtype_enabled", True
    )  # PEFT's own default, of layers without it
    if adapter_dtype is not dtype and not cast and not autocast_enabled(x):
        return f"its input is {dtype} and must not be cast to {adapter_dtype}"
    return None


def _why_not_dtypes(weight: Tensor, bias: Tensor | None, x: Tensor) -> str | None:
    if weight.dtype not in FLOATS or (bias is not None and bias.dtype is not weight.dtype):
        return f"its weight is {weight.dtype}, its bias {None if bias is None else bias.dtype}"
    if weight.dtype is not x.dtype and not autocast_enabled(x):
        return f"its input is {x.dtype}, its weight {weight.dtype}"
    return None


def why_stock_apart(layer: LoraLayer, adapters: list[Adapter], frozen: Frozen) -> str | None:
    """Why a layer whose product has another dtype than its input is left to PEFT; None of others."""
    if not frozen.apart:
        return None
    for adapter in adapters:
        if is_dora(layer, adapter.name) or variants.is_velora(layer, adapter.name):
            kind = type(layer.lora_variant[adapter.name]).__name__
            dtype = frozen.weight.dtype
            return f"{kind} whose base layer computes in {dtype}, its input in another dtype"
    return None


def why_stock_alora(
    layer: LoraLayer, adapters: list[Adapter], x: Tensor, offsets: Any
) -> str | None:
    """Why a layer with adapters of aLoRA is left to PEFT for this input; None of others.

    ``offsets`` are what PEFT calls ``alora_offsets``.
    """
    if not any(is_alora(layer, adapter.name) for adapter in adapters):
        return None
    if x.dim() not in (2, 3):
        return f"its input has shape {list(x.shape)}, and aLoRA is of [B, T, K] or [B, K]"
    if offsets is None:
        return None
    if type(offsets) not in (list, tuple) or len(offsets) != len(x):
        return f"alora_offsets is a {type(offsets).__name__}, or not one for each of {len(x)}"
    return None


def why_no_mixed_batch(rows: Any, x: Any) -> str | None:
    """Why ``rows``, its ``adapter_names``, don't name an adapter for each element of ``x``."""
    if not isinstance(rows, (list, tuple)) or not isinstance(x, Tensor):
        return "adapter_names is no list"
    if x.is_nested or x.dim() < 1 or len(rows) != len(x):
        return f"{len(rows)} adapter_names, and the input is nested or of another length"
    return None


def why_no_plain_batch(layer: LoraLayer, names: Any, x: Any) -> str | None:
    """The same where each adapter of the batch must be plain LoRA."""
    reason = why_no_mixed_batch(names, x)
    if reason is not None:
        return reason
    for name in dict.fromkeys(names):
        if name in layer.lora_variant:
            return OTHER_THAN_PLAIN.format(name)
    return None


def why_stock_mixed(
    layer: LoraLayer, changed: str | None, x: Any, kwargs: dict[str, Any]
) -> str | None:
    """Why a mixed batch is left to PEFT; ``kwargs`` are those of the call, and ``changed`` is what
    ``known`` has against the layer's method for it."""
    if changed is not None:
        return changed
    unknown = kwargs.keys() - {"adapter_names", "alora_offsets"}
    if unknown:
        return f"an argument that isn't known here: {', '.join(sorted(unknown))}"
    rows = kwargs["adapter_names"]
    reason = why_no_mixed_batch(rows, x)
    if reason is not None:
        return reason
    if x.dim() < 2:
        return f"{len(rows)} adapter_names, and the input is a row"
    for name in dict.fromkeys(rows):
        if name in layer.lora_variant and not _is_mixed(layer, name):
            return OTHER_THAN_PLAIN.format(name)
        dropout = layer.lora_dropout._modules.get(name)
        if type(dropout) is nn.Dropout and dropout.training:
            return f"adapter {name!r} of a mixed batch has dropout in training"
    several = sum(is_alora(layer, name) for name in dict.fromkeys(rows)) > 1
    if several and quantized.of_bitsandbytes(layer._modules["base_layer"]):
        return (
            "over bitsandbytes PEFT takes another adapter's alora_offsets for all but one of them"
        )
    return None


def _is_mixed(layer: LoraLayer, name: str) -> bool:
    """Whether a variant may be in a mixed batch: one that comes to LoRA of its own A and B."""
    if is_alora(layer, name):
        return True
    return variants.kind_of(layer, name) in variants.KINDS and not variants.is_more(layer, name)


def _type(module: nn.Module) -> str:
    return type(module).__qualname__
