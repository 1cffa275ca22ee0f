"""``Rows``: which adapter each element of a batch has, for the time of a block of ``mixed``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lorafast.core.context import without_autocast
from lorafast.ops.checks import describe_layout, has_rows


class Rows:
    """The name of an adapter for each element of a batch, None for those that have none.

    Args:
        names: one for each element of the first dimension.
        constants: whether no gradient passes the elements that have none.
    """

    __slots__ = ("constants", "names", "own", "runs", "used")

    def __init__(self, names: Sequence[str | None], constants: bool) -> None:
        self.names = tuple(names)
        self.constants = constants
        self.runs: list[tuple[str | None, int, int]] = []
        """Neighbours of one name: the name, the first and one behind the last."""
        for i, name in enumerate(self.names):
            if self.runs and self.runs[-1][0] == name:
                self.runs[-1] = (name, self.runs[-1][1], i + 1)
            else:
                self.runs.append((name, i, i + 1))
        self.used = [name for name in dict.fromkeys(self.names) if name is not None]
        """The names of adapters, each once."""
        named = [(first, end) for name, first, end in self.runs if name is not None]
        self.own: tuple[int, int] | None = named[0] if len(named) == 1 else None
        """The first element of the one adapter, and one behind its last, if they are neighbours."""

    def check(self, x: Tensor, dims: int = 1) -> None:
        """Raises ``ValueError`` if ``x`` hasn't as many elements, or fewer than ``dims`` dimensions."""
        if not has_rows(x):
            raise ValueError(
                f"x is {describe_layout(x)}, and a block of mixed names adapters for the elements of a "
                "strided tensor"
            )
        if x.dim() < dims or x.shape[0] != len(self.names):
            raise ValueError(
                f"x has shape {list(x.shape)}, and the block of mixed names adapters for "
                f"{len(self.names)} elements: expected as many in the first dimension, of {dims} or more"
            )

    def with_constants(self, y: Tensor) -> Tensor:
        """``y``, through whose elements without an adapter no gradient passes if they are constants."""
        if not self.constants or not y.requires_grad:
            return y
        parts = [y[at:end] if name else y[at:end].detach() for name, at, end in self.runs]
        return torch.cat(parts)

    def by_parts(
        self,
        tensors: Sequence[Tensor | None],
        forward: Callable[..., Tensor],
        base: Callable[..., Tensor],
        dims: int = 1,
    ) -> Tensor:
        """``forward`` of the elements of the one adapter and ``base`` of the others, in their order.
        ``dims``: the least that a tensor has with a batch."""
        for tensor in tensors:
            if tensor is not None:
                self.check(tensor, dims)
        if not self.used:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.constants):
                return base(*tensors)
        if len(self.runs) == 1:
            return forward(*tensors)
        if len(self.runs) == 2 or self.own is not None:
            found = [
                self._part(tensors, slice(*run), name, forward, base) for name, *run in self.runs
            ]
            return _together(found)
        own = [i for i, name in enumerate(self.names) if name is not None]
        others = [i for i, name in enumerate(self.names) if name is None]
        x: Any = tensors[0]
        order = torch.tensor(own + others, device=x.device)
        one = self._part(tensors, order[: len(own)], self.used[0], forward, base)
        two = self._part(tensors, order[len(own) :], None, forward, base)
        return _together([one, two]).index_select(0, order.argsort())

    def _part(
        self,
        tensors: Sequence[Tensor | None],
        at: slice | Tensor,
        name: str | None,
        forward: Callable[..., Tensor],
        base: Callable[..., Tensor],
    ) -> Tensor:
        if name is not None:
            return forward(*(None if t is None else t[at] for t in tensors))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.constants):
            return base(*(None if t is None else t[at] for t in tensors))


def _together(parts: list[Tensor]) -> Tensor:
    """As they are: autocast on a CPU would refuse float16 beside its bfloat16."""
    with without_autocast(parts[0]):
        return torch.cat(parts)
