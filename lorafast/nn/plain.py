"""The plain layers that an adapter layer can wrap, and what it takes over from one and gives back."""

import inspect
import sys
import weakref
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from lorafast import operands
from lorafast.nn import offload

# What nn.Module keeps of a module's hooks; they move with the layer when it is wrapped.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# Attributes of an instance that are PyTorch's or Accelerate's business and not the layer's.
_MACHINERY = frozenset(vars(nn.Module())) | {
    "_compiled_call_impl",
    "_hf_hook",
    "_old_forward",
    "forward",
    "in_features",
    "out_features",
}
# What a subclass may redefine of nn.Module's without a difference to a layer that wraps it.
_HARMLESS = frozenset(
    {
        "__annotations__", "__dict__", "__doc__", "__firstlineno__", "__init__", "__init_subclass__",
        "__module__", "__new__", "__repr__", "__static_attributes__", "__subclasshook__",
        "__weakref__", "_get_name", "_version", "extra_repr", "forward",
    }
)  # fmt: skip
_STORES = ("_parameters", "_buffers", "_modules")


def stock_class(module: nn.Module) -> type[nn.Module] | None:
    """``nn.Linear`` or Transformers' ``Conv1D``, whichever ``module`` is; None if it is neither."""
    if isinstance(module, nn.Linear):
        return nn.Linear
    return conv1d() if is_conv1d(module) else None


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer, of a format of ``lorafast.operands`` too."""
    return stock_class(module) is not None or operands.of_layer(module) is not None


def conv1d() -> type[nn.Module] | None:
    """Transformers' ``Conv1D``, GPT-2's linear layer; None until something has imported it."""
    found = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return found if isinstance(found, type) else None


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is a ``Conv1D``: a linear layer that keeps its weight as ``[in, out]``."""
    found = conv1d()
    return found is not None and isinstance(module, found)


def features(linear: Any) -> tuple[int, int]:
    """``in_features`` and ``out_features`` of a linear layer or a ``LoRALinear``."""
    weight = operands.of_layer(linear)
    if weight is not None:
        return weight.shape[1], weight.shape[0]
    if is_conv1d(linear):
        return linear.weight.shape[0], linear.weight.shape[1]
    return linear.in_features, linear.out_features


def frozen_tensor(linear: Any) -> Tensor:
    """The weight of a linear layer, or the first tensor that it is stored in."""
    weight = operands.of_layer(linear)
    return linear.weight if weight is None else operands.stored(weight)[0]


def is_own_forward(module: nn.Module, forward: object, stock: type[nn.Module]) -> bool:
    """Whether ``forward`` is the method of ``stock`` bound to ``module``, as hooks leave it behind."""
    return (
        getattr(forward, "__func__", None) is stock.forward
        and getattr(forward, "__self__", None) is module
    )


def why_not_its_forward(module: nn.Module, stock: type[nn.Module]) -> str | None:
    """The reason for which a forward on the instance itself would be lost with it, or None."""
    forward = vars(module).get("forward")
    if forward is None or is_own_forward(module, forward, stock):
        return None
    if offload.is_wrapped(module):
        return offload.why_not_movable(module)
    return f"its forward is replaced on the instance ({type(module).__name__}), which would be lost"


def why_not_carried(
    module: nn.Module, stock: type[nn.Module], taken: Collection[str], wrapper: str
) -> str | None:
    """What of ``module`` a ``wrapper``, which has the names ``taken``, would lose; None if nothing.

    A method that nn.Module's own code calls is lost without a word when the class changes. Other
    methods of a subclass are missed aloud by whoever calls them.
    """
    kind = type(module)
    if kind is not stock:
        for name in dir(nn.Module):
            if name not in _HARMLESS and _static(kind, name) is not _static(stock, name):
                return f"its class {kind.__name__} has a {name} of its own, which would be lost"
    if vars(module).get("_compiled_call_impl") is not None:
        return "it was compiled in place: adapt it before Module.compile()"
    for name in _own_names(module):
        if name in taken:
            return f"its attribute {name!r} has the name of one that a {wrapper} has"
    return None


def _static(kind: type, name: str) -> Any:
    return inspect.getattr_static(kind, name, None)


def _own_names(module: nn.Module) -> list[str]:
    stores = [name for store in _STORES for name in getattr(module, store)]
    return [name for name in vars(module) if name not in _MACHINERY] + stores


def carry(source: nn.Module, target: nn.Module, but: Collection[str]) -> None:
    """Gives ``target`` what ``source`` holds (attributes, tensors, submodules) but for ``but``."""
    for name, value in vars(source).items():
        if name not in _MACHINERY and name not in but:
            vars(target)[name] = value
    for store in _STORES:
        for name, value in getattr(source, store).items():
            if name not in but:
                getattr(target, store)[name] = value
    target._non_persistent_buffers_set |= source._non_persistent_buffers_set - set(but)


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Gives ``target`` the hooks of ``source``, whose place it takes; their handles go on working."""
    for name in _HOOKS:
        if name in vars(source):
            setattr(target, name, getattr(source, name))
    for hook in target._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):  # PyTorch has bound it to its module by a weakref
            vars(hook)["module"] = weakref.ref(target)
