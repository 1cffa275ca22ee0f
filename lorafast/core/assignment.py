"""``Assignment``: which adapter each element of a batch has, known to the host or to a GPU alone."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")
_NEVER_READ = ("cuda", "meta")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def integers(adapter_of: Any) -> list[int]:
    """The host's indices as a list. Raises ``TypeError`` if they are not integers; a bool is none."""
    if isinstance(adapter_of, (str, int)) or not isinstance(adapter_of, Sequence):
        raise TypeError(
            f"adapter_of is a {type(adapter_of).__name__}, expected a sequence of integers or a tensor"
        )
    found = list(adapter_of)
    if set(map(type, found)) <= {int}:  # faster than a look at each
        return found
    for i, g in enumerate(found):
        if isinstance(g, bool) or not isinstance(g, int):
            raise TypeError(f"adapter_of holds {g!r} at {i}, expected integers")
    return found


class Assignment:
    """For each of ``E`` elements, which are as many rows each, the index of its adapter, -1 for none.

    ``adapter_of`` is a list where the host knows it. Where a GPU alone does, it is an int64 tensor
    ``[E]``, whose values the host must not ask for, or it waits for the GPU. A backend keeps here what
    it makes of it, for the forward and the backward of one call.

    Raises:
        TypeError: ``adapter_of`` is not integers.
    """

    __slots__ = ("_made", "adapter_of", "elements")

    def __init__(self, adapter_of: Sequence[int] | Tensor) -> None:
        if isinstance(adapter_of, Tensor):
            if adapter_of.dtype not in INTEGERS:
                raise TypeError(f"adapter_of is {adapter_of.dtype}, expected integers")
            adapter_of = adapter_of.flatten().to(torch.int64)
            self.elements = adapter_of.shape[0]
            if adapter_of.device.type not in _NEVER_READ:
                adapter_of = adapter_of.tolist()
        else:
            adapter_of = integers(adapter_of)
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
