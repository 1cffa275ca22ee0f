"""Layers whose values Accelerate keeps elsewhere: in the CPU's memory, or on a disk.

Its hook replaces the ``forward`` of a layer, and the layer's parameters by ones on meta between two
calls. A LoRA layer keeps such a hook of the layer that it wraps, for the frozen parameters alone: A and
B stay where they are trained.
"""

import contextlib
import copy
import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lorafast.operands import Weight


def hooks_of(module: nn.Module) -> list[Any]:
    """Accelerate's hooks on ``module`` itself, those of a sequence one by one."""
    return _flat(vars(module).get("_hf_hook"))


def _flat(hook: Any) -> list[Any]:
    if hook is None:
        return []
    if type(hook).__name__ == "SequentialHook":
        return [one for inner in hook.hooks for one in _flat(inner)]
    return [hook]


def why_not_movable(module: nn.Module) -> str | None:
    """The reason for which Accelerate's hooks on ``module`` can't go over to another layer, or None."""
    accelerate = sys.modules.get("accelerate.hooks")
    for hook in hooks_of(module):
        if accelerate is None or not isinstance(hook, accelerate.AlignDevicesHook):
            return (
                f"its forward is wrapped by Accelerate's hook {type(hook).__name__}: remove it before "
                "(accelerate.hooks.remove_hook_from_module) and add it again after"
            )
    return None


def is_wrapped(module: nn.Module) -> bool:
    """Whether the ``forward`` of this instance is Accelerate's, around that of its class."""
    forward = vars(module).get("forward")
    inner = vars(module).get("_old_forward")
    return (
        "_hf_hook" in vars(module)
        and isinstance(forward, functools.partial)
        and forward.func.__module__ == "accelerate.hooks"
        and getattr(inner, "__func__", None) is type(module).forward
    )


def _offloads(module: nn.Module) -> bool:
    return any(getattr(hook, "offload", False) for hook in hooks_of(module))


def device_of(module: nn.Module, tensor: Weight) -> torch.device:
    """Where ``tensor`` of ``module`` is in a forward."""
    if tensor.is_meta:
        for hook in hooks_of(module):
            if getattr(hook, "offload", False) and hook.execution_device is not None:
                return torch.device(hook.execution_device)
    return tensor.device


@contextlib.contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Within the block the parameters of ``module`` have their values, as in its forward."""
    if not _offloads(module):
        yield
        return
    hook = vars(module)["_hf_hook"]
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def wrap(linear: nn.Module, layer: nn.Module) -> None:
    """Gives ``layer``, which wraps ``linear``, the hooks of ``linear`` for what both have."""
    if hooks_of(linear):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(layer, _frozen_hook()(linear))


def unwrap(layer: nn.Module, linear: nn.Module) -> None:
    """Gives ``linear``, made from ``layer``, its hooks; what was offloaded goes to the CPU's memory."""
    hooks = hooks_of(layer)
    if not hooks:
        return
    from accelerate.hooks import SequentialHook, add_hook_to_module

    hooks = [one for hook in hooks for one in getattr(hook, "of_linear", [hook])]
    copies = [copy.copy(hook) for hook in hooks]
    for hook in copies:
        if hook.offload:
            hook.weights_map = None  # the hook makes it from the layer
            hook.tied_params_map, hook.tied_params_names = None, set()
    add_hook_to_module(linear, copies[0] if len(copies) == 1 else SequentialHook(*copies))


@functools.cache
def _frozen_hook() -> type:
    from accelerate.hooks import AlignDevicesHook

    class FrozenWeightsHook(AlignDevicesHook):
        """The hook of a wrapped layer, which it goes on serving; the wrapper shows its tensors."""

        def __init__(self, linear: nn.Module) -> None:
            self.linear = linear
            self.hook = vars(linear)["_hf_hook"]
            self.of_linear = _flat(self.hook)
            self._main = next((h for h in self.of_linear if h.offload), self.of_linear[-1])

        # Accelerate reads these, and sets the first to bring the values elsewhere for once.
        @property
        def execution_device(self) -> Any:
            return self._main.execution_device

        @execution_device.setter
        def execution_device(self, device: Any) -> None:
            self._main.execution_device = device

        @property
        def offload(self) -> bool:
            return bool(self._main.offload)

        @property
        def weights_map(self) -> Any:
            return self._main.weights_map

        def __repr__(self) -> str:
            return f"FrozenWeightsHook({self.hook!r})"

        def _show(self, module: nn.Module) -> None:
            module._parameters.update(self.linear._parameters)
            module._buffers.update(self.linear._buffers)

        def init_hook(self, module: nn.Module) -> nn.Module:
            return module

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            passed = self.hook.pre_forward(self.linear, *args, **kwargs)
            self._show(module)
            return passed

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            output = self.hook.post_forward(self.linear, output)
            self._show(module)
            return output

        def detach_hook(self, module: nn.Module) -> nn.Module:
            self.hook.detach_hook(self.linear)
            self._show(module)
            return module

    return FrozenWeightsHook
