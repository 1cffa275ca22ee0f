"""Counters and flags by which the CTAs of one launch synchronise.

Counters are zero at the kernel boundary. A kernel finds them zero, and its last CTA sets them back to
zero. So nothing is cleared between launches.

Their memory is taken from slabs. A slab belongs to a device, is zeroed once and never freed.

- A stream has one slice, which its launches share: they run one after the other.
- A captured launch has a slice of its own for ever. Its graph may be replayed at any time, on any
  stream, beside other work, and nothing tells when the graph is gone.

The first launch on a device makes a slab, and a later one makes another when half of the last slab is
given away, up to ``_MOST_SLABS``. A capture makes none. A captured launch for which no slab has room
gets memory of its graph, with a memset before each replay.
"""

import threading

import torch
from torch import Tensor

from lorafast.core.device_memory import lasting

_SLAB = 1 << 20  # int32 in a slab; a launch takes about 100
_MOST_SLABS = 8  # for each device: a program that captures for ever must not fill the memory
_LINE = 32  # int32 in a cache line; two launches never share one
_FEWEST = 4096  # int32 in a stream's slice


class _Slab:
    """Zeros on one device, given away from the front."""

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self._taken = 0

    @property
    def half_gone(self) -> bool:
        """Whether less than half of it is left."""
        return 2 * self._taken > self._memory.numel()

    def take(self, count: int) -> Tensor | None:
        """``count`` zeros that no other launch has, or None if there is no room for them."""
        begin, size = self._taken, -(-count // _LINE) * _LINE
        if begin + size > self._memory.numel():
            return None
        self._taken += size
        return self._memory[begin : begin + count]


_lock = threading.Lock()
_slabs: dict[torch.device, list[_Slab]] = {}
_of_stream: dict[tuple[torch.device, int], Tensor] = {}


def counters(x: Tensor, count: int) -> Tensor:
    """At least ``count`` int32 zeros for one launch on the current stream of the device of ``x``."""
    if not x.is_cuda:
        return torch.zeros(count, dtype=torch.int32, device=x.device)
    if torch.cuda.is_current_stream_capturing():
        return _captured(x.device, count)
    key = (x.device, _stream(x.device))
    kept = _of_stream.get(key)
    if kept is None or kept.numel() < count or _due(_slabs[x.device]):
        kept = _for_stream(key, kept, count)
    return kept


def _captured(device: torch.device, count: int) -> Tensor:
    with _lock:
        piece = _take(device, count)
    # The graph captures this memset too.
    return torch.zeros(count, dtype=torch.int32, device=device) if piece is None else piece


def _for_stream(key: tuple[torch.device, int], kept: Tensor | None, count: int) -> Tensor:
    """The slice of a stream, with room for ``count``; makes a slab where one is due."""
    device, _ = key
    with _lock:
        slabs = _slabs.setdefault(device, [])
        if _due(slabs):
            slabs.append(_Slab(_zeros(device, _SLAB)))
        if kept is None or kept.numel() < count:
            # Twice as long as the last one: what is left behind is never longer than what is in use.
            size = max(count, _FEWEST, 0 if kept is None else 2 * kept.numel())
            found = _take(device, size)
            kept = _of_stream[key] = _zeros(device, size) if found is None else found
    return kept


def _due(slabs: list[_Slab]) -> bool:
    """Whether to make another slab, so that later captures find room."""
    return not slabs or (slabs[-1].half_gone and len(slabs) < _MOST_SLABS)


def _take(device: torch.device, count: int) -> Tensor | None:
    pieces = (slab.take(count) for slab in _slabs.get(device, ()))
    return next((piece for piece in pieces if piece is not None), None)


def _zeros(device: torch.device, count: int) -> Tensor:
    """Zeros in the device's default memory pool, ready for every stream."""
    return lasting(lambda: torch.zeros(count, dtype=torch.int32, device=device), device)


def _stream(device: torch.device) -> int:
    """The handle of the current stream, without an object of PyTorch's around it."""
    handle: int = torch._C._cuda_getCurrentRawStream(device.index)
    return handle
