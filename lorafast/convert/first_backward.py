"""After the first backward: which adapters got no gradient, where others did.

A parent may read a layer's weight and never call the layer; its adapter is then never trained. Hooks on
the adapters notice, and the first backward removes them, so that later ones don't pay for them.
"""

import re
import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import Node

from lorafast.convert.targets import some
from lorafast.nn.adapter_module import AdapterModule, adapters_in


class _Hook:
    """What autograd calls when the watched parameter of a layer has got a gradient."""

    def __init__(self, watch: "_Watch", name: str, layer: AdapterModule) -> None:
        self.watch, self.name, self.layer = watch, name, weakref.ref(layer)
        watched: Tensor = getattr(layer, layer.watched_parameter)
        self.handle = watched.register_post_accumulate_grad_hook(self)

    def __call__(self, watched: Tensor) -> None:
        if not torch.compiler.is_compiling():  # compiled autograd has no end of a backward
            self.watch.got_gradient(self)

    def is_in_place(self) -> bool:
        """Whether the layer still has the parameter that was watched; one put in its place is not."""
        layer = self.layer()
        return layer is not None and _hook_of(layer) is self

    def remove(self) -> None:
        self.handle.remove()
        layer = self.layer()
        watched = None if layer is None else _watched(layer)
        if watched is not None and not watched._post_accumulate_grad_hooks:
            # Autograd would look into an empty dict in every backward.
            watched._post_accumulate_grad_hooks = None  # type: ignore[assignment]


class _Watch:
    """The adapters of a model: those that still wait for a gradient, and those that have got one."""

    def __init__(self, layers: dict[str, AdapterModule]) -> None:
        self.waiting = {name: _Hook(self, name, layer) for name, layer in layers.items()}
        self.got: dict[str, _Hook] = {}
        self.reported = False
        self._backward = -1

    def got_gradient(self, hook: _Hook) -> None:
        self.got[hook.name] = hook
        self.waiting.pop(hook.name, None)
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward = backward
            _at_end_of_backward(self._end)

    def _end(self) -> None:
        for hook in self.got.values():
            hook.remove()
        if self.got and not self.reported:
            self.reported = True
            left = self.left()
            if left:
                warnings.warn(_SENTENCE.format(some(left)), stacklevel=2)
        self.got.clear()

    def left(self) -> list[str]:
        """The layers without a gradient, but those whose like in another block or expert has got one."""
        roles = {_role(name) for name in self.got}
        return [
            name
            for name, hook in self.waiting.items()
            if _role(name) not in roles and hook.is_in_place() and _can_get_one(hook.layer())
        ]

    def stop(self) -> None:
        for hook in (*self.waiting.values(), *self.got.values()):
            hook.remove()


_SENTENCE = (
    "these layers' adapters got no gradient in the first backward, where others did: {} (nobody called "
    "the layers, as where a module reads its child's weight, or the loss doesn't depend on them)"
)


def watch(model: nn.Module) -> None:
    """Warns after the next backward of adapters in ``model`` that get no gradient in it, once."""
    layers = adapters_in(model)
    for old in {hook.watch for hook in map(_hook_of, layers.values()) if hook is not None}:
        old.stop()
    _Watch({name: layer for name, layer in layers.items() if _can_get_one(layer)})


def waits_for_gradient(layer: AdapterModule) -> bool:
    """Whether a backward has passed ``layer`` by, and none has reached it since."""
    hook = _hook_of(layer)
    return hook is not None and hook.watch.reported


def _hook_of(layer: AdapterModule) -> _Hook | None:
    hooks = getattr(_watched(layer), "_post_accumulate_grad_hooks", None) or {}
    return next((hook for hook in hooks.values() if isinstance(hook, _Hook)), None)


def _can_get_one(layer: AdapterModule | None) -> bool:
    watched = None if layer is None or layer.merged else _watched(layer)
    return watched is not None and watched.requires_grad


def _watched(layer: AdapterModule) -> Tensor | None:
    return layer._parameters.get(layer.watched_parameter)


def _role(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _at_end_of_backward(call: Callable[[], None]) -> None:
    """Calls when the running backward has ended, and if it runs within another, when that has.

    Reentrant checkpointing runs a backward for each block within a node of the model's own.
    """

    def end() -> None:
        node: Node | None = torch._C._current_autograd_node()  # of the backward around this one
        if node is None:
            call()
        else:
            _at_end_of_the_backward_of(node, call)

    Variable._execution_engine.queue_callback(end)


def _at_end_of_the_backward_of(node: Node, call: Callable[[], None]) -> None:
    def queue(gradients: tuple[Tensor, ...]) -> None:
        handle.remove()
        _at_end_of_backward(call)

    # Hooks of a node that is running come too late; the next one runs in the same backward.
    after = next((function for function, _ in node.next_functions if function is not None), None)
    if after is None:
        call()
    else:
        handle = after.register_prehook(queue)
