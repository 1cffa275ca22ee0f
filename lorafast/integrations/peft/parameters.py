"""LoRA over a parameter (``target_parameters``): which of PEFT's calls are served fast, and how.

PEFT registers a parametrization around each call, which makes ``W + ΔW`` once for a check and once for
the forward, and a class for it. Here it is made once, in one batched product, and stands in the module's
place for W while that runs. Over the weight of an ``nn.Linear`` it isn't made at all.
"""

from typing import Any

import torch
from torch import Tensor

from lorafast.core.context import without_autocast
from lorafast.integrations.peft import parameter_rules, rules
from lorafast.integrations.peft.adapters import Adapter, active, weight_of
from lorafast.integrations.peft.linear import lora_linear

_STANDS_IN = "_lorafast_stands_in"
"""The mark of ``W + ΔW`` in the place of W."""


def forward(layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any] | None:
    """What the base layer returns, in a tuple, or None where PEFT serves the call itself."""
    if "adapter_names" in kwargs:
        return None
    adapters = active(layer)
    if parameter_rules.why_stock_parameter(layer, adapters) is not None:
        return None
    if not args and not kwargs:
        y = _linear(layer, x, adapters)
        if y is not None:
            return (y,)
    if torch.compiler.is_compiling():
        return None
    parameters, name = layer.get_base_layer()._parameters, layer.parameter_name
    W = parameters[name]
    if hasattr(W, _STANDS_IN):
        raise RuntimeError(
            f"{name} of a {type(layer.get_base_layer()).__name__} is adapted by a call that has not "
            "ended: a module with target_parameters can't run in two threads at once"
        )
    made = adapted(layer, W, adapters)
    setattr(made, _STANDS_IN, True)
    parameters[name] = made
    try:
        return (layer.base_layer(x, *args, **kwargs),)
    finally:
        parameters[name] = W


def _linear(layer: Any, x: Any, adapters: list[Adapter]) -> Tensor | None:
    """The layer over the weight of a linear layer, or None if it isn't one."""
    base = layer._modules["base_layer"]
    if not parameter_rules.is_linear(layer, base):
        return None
    weight = weight_of(base)
    if rules.why_stock_input(layer, adapters, weight, x) is not None:
        return None
    return lora_linear(x, weight, adapters, base._parameters["bias"])


def adapted(layer: Any, W: Tensor, adapters: list[Adapter]) -> Tensor:
    """``W + Σ scaling · ΔW`` of some adapters, of an expert each where W is three-dimensional.

    Shapes: W ``[N, K]`` and ΔW ``B·A``, or W ``[E, N, K]`` or ``[E, K, N]`` and ΔW of each expert.
    As in PEFT the factors of one adapter of several experts are in the dtype of W; else ΔW is computed
    in that of the factors, and rounded once.
    """
    alone = len(adapters) == 1 and layer.num_experts > 1
    factors = [_factors(layer, adapter, W.dtype if alone else None) for adapter in adapters]
    if len(factors) == 1:
        (left, right), scaling = factors[0], adapters[0].scaling
    else:
        left = torch.cat([f[0] * a.scaling for f, a in zip(factors, adapters, strict=True)], -1)
        right, scaling = torch.cat([f[1] for f in factors], -2), 1.0
    with without_autocast(W):
        if left.dtype is not W.dtype:
            return W + ((left @ right) * scaling).to(W.dtype)
        if W.dim() == 2:
            return torch.addmm(W, left, right, alpha=scaling)
        return torch.baddbmm(W, left, right, alpha=scaling)


def _factors(layer: Any, adapter: Adapter, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Two factors whose product is ΔW without its scaling, in ``dtype``, None for their own."""
    A, B, E = adapter.lora_A.weight, adapter.lora_B.weight, layer.num_experts
    if dtype is not None:
        A, B = A.to(dtype), B.to(dtype)
    if E == 1:
        return B, A
    A = A.reshape(E, -1, A.shape[1])  # [E, r, K]
    B = B.reshape(B.shape[0], -1, E).permute(2, 0, 1)  # [E, N, r]
    return (B, A) if layer._did_swap_in_out_features else (A.mT, B.mT)
