"""``Operand``: a frozen weight in a format of its own."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

_TILE_BYTES = 1 << 26
"""Rows are made dense in pieces of about this size."""


@dataclass(frozen=True)
class Split:
    """How an operand is cut into equal parts of its rows or columns, each an operand of its format."""

    tensors: Mapping[str, Tensor]
    """What all of W is stored in, laid out so that each part has a piece of each, or all of it."""
    dims: Mapping[str, int | None]
    """The dimension along which a tensor is cut; None: every part has all of it."""
    parameters: str
    """Those of all of W, so stored."""
    of_part: str
    """Those of a part."""


class Operand(ABC):
    """A frozen weight W ``[N, K]`` that is not stored as one dense tensor.

    A plain tensor is an operand itself, of the format ``dense``; whatever else a weight is stored as is
    a subclass, given to ``lorafast.operands.register``. It has

    - ``format``: its name, one word;
    - ``shape``, ``dtype``: those of W as it is multiplied: ``x`` has this dtype;
    - ``tensors()``: the tensors that it is stored in, by the names they have in a ``state_dict``, of
      which none has a comma or a bar;
    - ``parameters``: what else it takes to read them, as text ('' if nothing): block sizes, a shape;
    - ``build(tensors, parameters)``: the operand again, from these two;
    - ``rows(begin, end)``: rows of W, dense, in ``dtype``, which ``to`` may have set;
    - ``of_layer(layer)``: the operand of a layer that keeps its weight so, if there are such layers.

    The products made of ``rows`` here serve until a format or a backend has its own. No gradient flows
    into an operand, and none of its tensors may require one.
    """

    format: ClassVar[str]
    shape: torch.Size
    dtype: torch.dtype
    parameters: str = ""
    keeps_dtypes: ClassVar[bool] = False
    """Whether its tensors stay as they are when their layer is cast: W is then multiplied in the layer's
    new dtype."""
    cast: torch.dtype | None = None
    """What ``to`` has made ``dtype``, where that is not what ``build`` makes it."""

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

    @classmethod
    def of_layer(cls, layer: nn.Module) -> "Operand | None":
        """The frozen weight of ``layer``, or None if it is no layer of this format.

        ``layer(x)`` must be ``x·Wᵀ + layer.bias`` (without a bias if there is none); the operand has the
        layer's own tensors, not copies. Asked of every layer of a model that is adapted.
        """
        return None

    def activations(self, x: Tensor) -> Tensor:
        """What W multiplies in the forward in the place of ``x [..., K]``: x, unless the format rounds
        it. Then ``linear`` does so too, and the backward is as if it didn't."""
        return x

    def unrounded(self) -> "Operand":
        """The same W, which multiplies x as it is: that of every derivative."""
        return self

    def like(self, weight: Tensor) -> "Operand":
        """``weight [N, K]``, a float tensor, quantized as this one is: its blocks, its dtypes.

        Raises:
            ValueError: nothing quantizes to this format.
        """
        raise ValueError(f"nothing quantizes to {self.format}")

    def split(self, dim: int, parts: int) -> Split:
        """How W is cut along ``dim``, 0 for its rows and 1 for its columns.

        Raises:
            ValueError: it can't be; the message is the end of a sentence that begins with the layer.
        """
        raise ValueError(f"is stored as {self.format}, which can't be cut into parts")

    def _check_split(self, dim: int, parts: int, multiple: int = 1) -> int:
        """The rows or columns of a part; ``ValueError`` unless they are a multiple of ``multiple``."""
        size, what = self.shape[dim], ("rows", "columns")[dim]
        if size % (parts * multiple):
            of = f"{parts} parts" + (f" of whole blocks of {multiple}" if multiple > 1 else "")
            raise ValueError(
                f"is stored as {self.format}, whose {size} {what} can't be cut into {of}"
            )
        return size // parts

    def dense(self) -> Tensor:
        """W ``[N, K]``."""
        return self.rows(0, self.shape[0])

    def to(self, dtype: torch.dtype) -> "Operand":
        """The same weight, multiplied in ``dtype``; autocast asks for it."""
        if dtype is self.dtype:
            return self
        twin = type(self).build(self.tensors(), self.parameters)
        if dtype is not twin.dtype:
            twin.dtype = twin.cast = dtype
        return twin

    @property
    def device(self) -> torch.device:
        """Where it is.

        Raises:
            ValueError: its tensors are on several devices.
        """
        (first, tensor), *others = self.tensors().items()
        for name, other in others:
            if other.device != tensor.device:
                raise ValueError(
                    f"{name} of weight is on {other.device}, expected {tensor.device}, where {first} is"
                )
        return tensor.device

    def get_device(self) -> int:
        """As a tensor's."""
        device = self.device
        return -1 if device.type in ("cpu", "meta") else device.index

    @property
    def layout(self) -> object:
        """As a tensor's, what plans and checks ask of it beside its size, dtype and device."""
        kinds = [(type(t), t.dtype, t.requires_grad) for t in self.tensors().values()]
        return self.parameters, *kinds

    @property
    def requires_grad(self) -> bool:
        """Whether one of its tensors does, which is refused."""
        return any(tensor.requires_grad for tensor in self.tensors().values())

    @property
    def is_cpu(self) -> bool:
        """Whether it is in the host's memory."""
        return self.device.type == "cpu"

    @property
    def is_meta(self) -> bool:
        """Whether it has no memory."""
        return self.device.type == "meta"

    def numel(self) -> int:
        """Elements of W."""
        return self.shape.numel()

    def dim(self) -> int:
        """W is a matrix."""
        return 2

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x·Wᵀ + bias`` for ``x [M, K]``, tile by tile."""
        N, K = self.shape
        step = max(_TILE_BYTES // max(K * self.dtype.itemsize, 1), 1)
        if step >= N:
            return F.linear(x, self.dense(), bias)
        y = x.new_empty((x.shape[0], N))
        for begin in range(0, N, step):
            end = min(begin + step, N)
            part = None if bias is None else bias[begin:end]
            y[:, begin:end] = F.linear(x, self.rows(begin, end), part)
        return y

    def linear_transposed(self, dy: Tensor) -> Tensor:
        """``dy·W`` for ``dy [M, N]``: all of W at once, for tiles would be rounded between."""
        return dy @ self.dense()

    def __repr__(self) -> str:
        shape = list(self.shape)
        return f"{type(self).__name__}(format={self.format}, shape={shape}, dtype={self.dtype})"


def said(part: object) -> str:
    """What stands in the place of a tensor, in a sentence."""
    return "None" if part is None else f"a {type(part).__name__}"


def check_tensors(tensors: Mapping[str, Any], names: Collection[str]) -> None:
    """That ``tensors`` has a tensor of each name.

    Raises:
        ValueError: one is missing, or is something else; the message names it.
    """
    for name in names:
        if name not in tensors:
            raise ValueError(f"{name} is missing, expected {', '.join(names)}")
        if not isinstance(tensors[name], Tensor):
            raise ValueError(f"{name} is {said(tensors[name])}, expected a tensor")


def check_quantizable(weight: object) -> None:
    """That ``weight`` is what formats quantize.

    Raises:
        ValueError: it is no float matrix of plain layout; the message says what it is.
    """
    expected = "expected a float matrix [N, K]"
    if not isinstance(weight, Tensor):
        raise ValueError(f"weight is {said(weight)}, {expected}")
    if weight.layout is not torch.strided:
        raise ValueError(f"weight is a tensor of {weight.layout}, {expected}")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight is {weight.dtype} {list(weight.shape)}, {expected}")


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that is NaN or infinite somewhere; None if none is, as far as there are
    values. To be given scales and tables of floats: bytes of codes may be any float."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.is_meta or is_fake(tensor):
            continue
        # An 8-bit float has no isfinite of its own everywhere.
        wide = tensor.float() if tensor.itemsize == 1 else tensor
        if not bool(wide.isfinite().all()):
            return name
    return None


def check_finite(scales: Mapping[str, Tensor]) -> None:
    """That ``not_finite`` finds none.

    Raises:
        ValueError: it does; the message names the tensor.
    """
    name = not_finite(scales)
    if name is not None:
        raise ValueError(f"{name} is NaN or infinite somewhere, expected finite scales")
