"""Rules of ``target_parameters``: as ``rules``, which calls are left to PEFT's own forward, and why."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lorafast.integrations.peft import rules
from lorafast.integrations.peft.adapters import Adapter


def why_stock_parameter(layer: Any, adapters: list[Adapter]) -> str | None:
    """Why a ``lora.ParamWrapper`` is left to PEFT, whatever its input."""
    reason = rules.why_stock(layer, adapters)
    if reason is not None:
        return reason
    owner: Any = layer.get_base_layer()
    if parametrize.is_parametrized(owner):
        return "its module has parametrizations"
    if "_hf_hook" in owner.__dict__:
        return "its module has a hook of accelerate's"
    reason = rules.why_parallel(owner)
    if reason is not None:
        return f"its module {reason}"
    W = owner._parameters.get(layer.parameter_name)
    # In a call that this package serves, W + ΔW stands in for a parameter around the layer.
    if type(W) is not nn.Parameter and type(W) is not Tensor:
        return f"its parameter is a {type(W).__name__}, not a plain tensor"
    if W.is_meta or W.layout is not torch.strided or W.dtype not in rules.FLOATS:
        return f"its parameter is {W.dtype}, {W.layout} or on the meta device"
    for adapter in adapters:
        reason = rules.why_not_adapter(adapter) or _why_not_factors(layer, adapter, W)
        if reason is not None:
            return reason
    return None


def _why_not_factors(layer: Any, adapter: Adapter, W: Tensor) -> str | None:
    name, lora_A, lora_B, _, scaling = adapter
    if isinstance(scaling, Tensor):
        return f"the scaling of adapter {name!r} is a tensor"
    if name in layer.lora_variant or lora_B.bias is not None:
        return f"adapter {name!r} is of another kind than plain LoRA"
    A, B, E = lora_A.weight, lora_B.weight, layer.num_experts
    if W.dim() == 2:
        N, K = W.shape
    elif layer._did_swap_in_out_features:
        _, N, K = W.shape
    else:
        _, K, N = W.shape
    experts = W.shape[0] if W.dim() == 3 else 1
    fits = experts == E and (W.dim() == 2) == (E == 1) and A.shape[0] % E == 0
    if not fits or A.shape != (A.shape[0], K) or B.shape != (N, A.shape[0]) or A.shape[0] == 0:
        shapes = f"{list(A.shape)} and {list(B.shape)}, the parameter {list(W.shape)}"
        return f"adapter {name!r} has the shapes {shapes}"
    if A.device != W.device or B.device != W.device:
        return f"adapter {name!r} is elsewhere than its parameter"
    for factor in (A, B):
        if factor.dtype is not W.dtype and factor.dtype is not torch.float32:
            return f"adapter {name!r} is {factor.dtype}, its parameter {W.dtype}"
    return None


def is_linear(layer: Any, base: nn.Module) -> bool:
    """Whether it is the weight of an ``nn.Linear`` that can be read in place of calling that."""
    return (
        type(base) is nn.Linear
        and layer.parameter_name == "weight"
        and rules.why_not_base(base) is None
    )
