"""What is changed of a model is put back where it fails halfway."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorafast.convert import encoders
from lorafast.convert.targets import replace
from lorafast.nn.plain import move_hooks


def copy_into(target: Tensor, value: Tensor) -> None:
    """Copies a value, into an inference tensor too."""
    with torch.inference_mode(target.is_inference()), torch.no_grad():
        target.copy_(value)


class Undo:
    """What is about to be changed of a model, as it was."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._requires_grad = [(p, p.requires_grad) for p in model.parameters()]
        self._values: list[tuple[Tensor, Tensor]] = []
        self._layers: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
        self.made: dict[nn.Module, nn.Module] = {}
        """Layers that took the hooks of others: the plain one, and what wraps it."""
        self.replaced: dict[str, nn.Module] = {}

    def keep(self, targets: Iterable[Tensor], layers: Iterable[nn.Module]) -> None:
        """Keeps the values of tensors, and the attributes and buffers of layers."""
        self._values = [(target, target.detach().clone()) for target in targets]
        self._layers = [(layer, dict(vars(layer)), dict(layer._buffers)) for layer in layers]

    def undo(self) -> None:
        """Puts everything back."""
        replace(self._model, self.replaced)
        encoders.undo(self._model)
        for plain, layer in self.made.items():
            move_hooks(layer, plain)
        for target, value in self._values:
            copy_into(target, value)
        for layer, attributes, buffers in self._layers:
            vars(layer).update(attributes)
            layer._buffers.update(buffers)
        for parameter, requires_grad in self._requires_grad:
            if parameter.requires_grad != requires_grad:
                with torch.inference_mode(parameter.is_inference()):
                    parameter.requires_grad = requires_grad  # a lazy one refuses requires_grad_()


@contextlib.contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[Undo]:
    """Undoes on an error within the block what its ``Undo`` was told of."""
    undo = Undo(model)
    try:
        yield undo
    except BaseException:
        undo.undo()
        raise
