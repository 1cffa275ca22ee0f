"""``Assignment``: which adapter each element of a batch has, known to the host or to a GPU alone."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")
_NEVER_READ = ("cuda", "meta")


class Assignment:
    """For each of ``E`` elements, which are as many rows each, the index of its adapter, -1 for none.

    ``adapter_of`` is a list where the host knows it. Where a GPU alone does, it is an int64 tensor
    ``[E]``, whose values the host must not ask for, or it waits for the GPU. A backend keeps here what
    it makes of it, for the forward and the backward of one call.
    """

    __slots__ = ("_made", "adapter_of", "elements")

    def __init__(self, adapter_of: list[int] | Tensor) -> None:
        if isinstance(adapter_of, Tensor):
            adapter_of = adapter_of.flatten().to(torch.int64)
            self.elements = adapter_of.shape[0]
            if adapter_of.device.type not in _NEVER_READ:
                adapter_of = adapter_of.tolist()
        else:
            self.elements = len(adapter_of)
        self.adapter_of: list[int] | Tensor = adapter_of
        self._made: dict[object, Any] = {}

    def made(self, make: Callable[..., Made], *of: object) -> Made:
        """``make(self, *of)``, made once."""
        key = (make, *of)
        if key not in self._made:
            self._made[key] = make(self, *of)
        found: Made = self._made[key]
        return found

    def tensor(self) -> Tensor:
        """``[E]`` int64, on the CPU where the host knows it."""
        if isinstance(self.adapter_of, Tensor):
            return self.adapter_of
        return torch.tensor(self.adapter_of, dtype=torch.int64)
