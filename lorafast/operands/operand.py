"""``Operand``: a frozen weight in a format of its own."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

_TILE_BYTES = 1 << 26
"""Rows are made dense in pieces of about this size."""


class Operand(ABC):
    """A frozen weight W ``[N, K]`` that is not stored as one dense tensor.

    A plain tensor is an operand itself, of the format ``dense``; whatever else a weight is stored as is
    a subclass, given to ``lorafast.operands.register``. It has

    - ``format``: its name, one word;
    - ``shape``, ``dtype``: those of W as it is multiplied: ``x`` has this dtype;
    - ``tensors()``: the tensors that it is stored in, by the names they have in a ``state_dict``;
    - ``parameters``: what else it takes to read them, as text ('' if nothing): block sizes, a shape;
    - ``build(tensors, parameters)``: the operand again, from these two;
    - ``rows(begin, end)``: rows of W, dense.

    The products made of ``rows`` here serve until a format or a backend has its own. No gradient flows
    into an operand.
    """

    format: ClassVar[str]
    shape: torch.Size
    dtype: torch.dtype
    parameters: str = ""

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """What it is stored in, in an order that is always the same."""

    @classmethod
    @abstractmethod
    def build(cls, tensors: Mapping[str, Tensor], parameters: str) -> "Operand":
        """The operand whose ``tensors()`` and ``parameters`` these are.

        Raises:
            ValueError: they make no operand of this format; the message names what doesn't fit.
        """

    @abstractmethod
    def rows(self, begin: int, end: int) -> Tensor:
        """Rows ``begin`` to ``end`` of W: ``[end - begin, K]``, in ``dtype``."""

    def dense(self) -> Tensor:
        """W ``[N, K]``."""
        return self.rows(0, self.shape[0])

    @property
    def device(self) -> torch.device:
        """Where it is: its tensors are on one device."""
        return next(iter(self.tensors().values())).device

    def get_device(self) -> int:
        """As a tensor's."""
        return next(iter(self.tensors().values())).get_device()

    @property
    def is_cpu(self) -> bool:
        """Whether it is in the host's memory."""
        return self.device.type == "cpu"

    @property
    def is_meta(self) -> bool:
        """Whether it has no memory."""
        return self.device.type == "meta"

    def dim(self) -> int:
        """W is a matrix."""
        return 2

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x·Wᵀ + bias`` for ``x [M, K]``, tile by tile."""
        N, K = self.shape
        y = x.new_empty((x.shape[0], N))
        step = max(_TILE_BYTES // max(K * self.dtype.itemsize, 1), 1)
        for begin in range(0, N, step):
            end = min(begin + step, N)
            part = None if bias is None else bias[begin:end]
            y[:, begin:end] = torch.nn.functional.linear(x, self.rows(begin, end), part)
        return y

    def linear_transposed(self, dy: Tensor) -> Tensor:
        """``dy·W`` for ``dy [M, N]``: all of W at once, for tiles would be rounded between."""
        return dy @ self.dense()
