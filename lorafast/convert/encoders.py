"""PyTorch's encoders, which in inference hand the bare weights of their layers to one fused kernel."""

from collections.abc import Callable

from torch import nn

from lorafast.nn import QuantizedLinear
from lorafast.nn.adapter_module import AdapterModule

_FUSES = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
"""A class, its attribute that decides, and the value with which it calls its layers."""


def avoid_fused(model: nn.Module, holds: Callable[[nn.Module], bool]) -> None:
    """Makes PyTorch's encoders call their layers where one ``holds`` a layer that was replaced."""
    for module in model.modules():
        for kind, name, called in _FUSES:
            if isinstance(module, kind) and holds(module) and getattr(module, name) != called:
                setattr(module, _before(name), getattr(module, name))
                setattr(module, name, called)


def undo(model: nn.Module) -> None:
    """Undoes ``avoid_fused`` where all layers are plain again."""
    for module in model.modules():
        for _, name, called in _FUSES:
            if _before(name) not in vars(module) or _has_replaced(module):
                continue
            if getattr(module, name) == called:
                setattr(module, name, getattr(module, _before(name)))
            delattr(module, _before(name))


def _before(name: str) -> str:
    """The attribute that keeps the value which an attribute had."""
    return f"_{name}_before"


def _has_replaced(module: nn.Module) -> bool:
    replaced = AdapterModule | QuantizedLinear
    return any(isinstance(inner, replaced) for inner in module.modules())
