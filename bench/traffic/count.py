"""Bytes and launches of PyTorch's own calls, counted at the dispatcher on meta tensors.

Every operation that isn't a view is one launch that reads its input tensors and writes its outputs,
each once; what it changes in place counts once each way. Allocations move nothing. As on a GPU: a
dropout is PyTorch's one fused operation, and DoRA's scale goes over a large output in one pass.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from lorafast.bench.traffic import bitsandbytes
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorafast.ops import scaled
from lorafast.ops.registration import implementation_of

_aten = torch.ops.aten
# They allocate, or rename what is there.
_MOVES_NOTHING = {
    _aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided,
    _aten._unsafe_view,
}  # fmt: skip
# Of their first argument they read no value: they write it, or what is like it.
_READS_NO_SELF = {_aten.copy_, _aten.zero_, _aten.fill_, _aten.new_zeros, _aten.zeros_like}


@dataclass
class Traffic:
    """What went through device memory: launches, bytes read, bytes written."""

    launches: int = 0
    read: int = 0
    written: int = 0

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read + self.written

    def add(self, launches: int, read: int, written: int) -> None:
        """One launch, or several."""
        self.launches += launches
        self.read += read
        self.written += written


class _CountingMode(TorchDispatchMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inner = implementation_of(func) or bitsandbytes.composition_of(func)
        if inner is not None:
            with self:
                return inner(*args, **kwargs)
        with self:  # an operation made of others comes whole where autograd is behind
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        out = func(*args, **kwargs)
        if func.overloadpacket is _aten.convolution_backward:
            self._count_gradients(args, out)
            return _in_the_format_of(out[0], args[1]), *out[1:]
        if func.overloadpacket is _aten.convolution:
            out = _in_the_format_of(out, args[0])
        if not func.is_view and func.overloadpacket not in _MOVES_NOTHING:
            read = sum(map(_bytes, _inputs(func, args, kwargs)))
            self._traffic.add(1, read, sum(map(_bytes, tree_leaves(out))))
        return out

    def _count_gradients(self, args: tuple[Any, ...], out: tuple[Any, ...]) -> None:
        """Of a convolution: one launch for each, which reads dy and the other factor."""
        dy, x, weight = args[:3]
        for gradient, factor in zip(out, (weight, x, None), strict=True):
            if gradient is not None:
                self._traffic.add(1, _bytes(dy) + _bytes(factor), _bytes(gradient))


def _in_the_format_of(out: Tensor | None, x: Tensor) -> Tensor | None:
    """What a convolution gives on a GPU is channels last where ``x`` is; without a device it isn't."""
    if out is None or x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return out
    return torch.empty_like(out, memory_format=torch.channels_last)


def _inputs(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments that ``func`` reads: not what it only writes, not an accumulator with beta = 0."""
    arguments = func._schema.arguments
    named = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
    unread = {argument.name for argument in arguments if argument.is_out}
    if named.get("beta") == 0 or func.overloadpacket in _READS_NO_SELF:
        unread.add("self")
    for name, value in named.items():
        if name not in unread:
            yield from tree_leaves(value)


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


class _FusedDropout(TorchFunctionMode):
    """What PyTorch does on a GPU; elsewhere ``F.dropout`` is four operations."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.dropout:
            return _fused_dropout(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused_dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p else input


@contextmanager
def counting() -> Iterator[Traffic]:
    """Counts what runs within the block (on meta tensors, so nothing is computed)."""
    traffic = Traffic()
    with _scaled_as_on_a_gpu(), _FusedDropout(), _CountingMode(traffic):
        yield traffic


def _scaled_as_on_a_gpu() -> AbstractContextManager[Any]:
    """Elsewhere, and where a mode is open as here, ``scaled`` is operations of PyTorch's."""
    return mock.patch.multiple(scaled, alone=lambda: True, _pays=scaled._pays_on_a_gpu)
