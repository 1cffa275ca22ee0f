"""Counters and flags by which the programs of one launch find each other.

They are zero at the kernel boundary: a kernel finds them zero and leaves them zero, for whoever comes
last puts them back. So nothing is cleared between launches.

They lie in slabs of each device, memory that nothing else is given, zeroed before its first use and
never freed. Of them

- each stream has a piece, which its launches, one after the other, share;
- each captured launch has a piece of its own, for good: its graph may be replayed at any time, on any
  stream, beside anything. Nothing tells when a graph is gone, so no other launch is ever given it.

A slab is made outside captures: by a device's first launch, and whenever half of the last one is gone,
up to a few. A captured launch that finds no room gets memory of its graph's, and a memset before it.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_SLAB = 1 << 20  # int32 of a slab; a launch takes some 100
_MOST_SLABS = 8  # of a device, lest captures without end take memory without end
_LINE = 32  # int32 of a cache line: two launches share none
_FEWEST = 4096  # of a stream's piece


class _Slab:
    """Zeros of one device, handed out from the front."""

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self._taken = 0

    @property
    def half_gone(self) -> bool:
        """Whether less than half of it is left."""
        return 2 * self._taken > self._memory.numel()

    def take(self, count: int) -> Tensor | None:
        """``count`` zeros that nobody else has, or None if there are no more so many."""
        begin, size = self._taken, -(-count // _LINE) * _LINE
        if begin + size > self._memory.numel():
            return None
        self._taken += size
        return self._memory[begin : begin + count]


_lock = threading.Lock()
_slabs: dict[torch.device, list[_Slab]] = {}
_of_stream: dict[tuple[torch.device, int], Tensor] = {}


def counters(x: Tensor, count: int) -> Tensor:
    """At least ``count`` int32 zeros for one launch on the device and the current stream of ``x``."""
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
    # Cleared by every replay.
    return torch.zeros(count, dtype=torch.int32, device=device) if piece is None else piece


def _for_stream(key: tuple[torch.device, int], kept: Tensor | None, count: int) -> Tensor:
    """The piece of a stream, a longer one if need be; makes a slab where one is due."""
    device, _ = key
    with _lock:
        slabs = _slabs.setdefault(device, [])
        if _due(slabs):
            slabs.append(_Slab(_zeros(device, _SLAB)))
        if kept is None or kept.numel() < count:
            # Twice as many as before, so that those left behind are never more than those in use.
            size = max(count, _FEWEST, 0 if kept is None else 2 * kept.numel())
            found = _take(device, size)
            kept = _of_stream[key] = _zeros(device, size) if found is None else found
    return kept


def _due(slabs: list[_Slab]) -> bool:
    """Whether a device needs a further slab, lest a capture find no room."""
    return not slabs or (slabs[-1].half_gone and len(slabs) < _MOST_SLABS)


def _take(device: torch.device, count: int) -> Tensor | None:
    pieces = (slab.take(count) for slab in _slabs.get(device, ()))
    return next((piece for piece in pieces if piece is not None), None)


def _zeros(device: torch.device, count: int) -> Tensor:
    """Zeros that every stream sees, and that are nobody's memory to free.

    Made by a thread of its own: where this one's allocations go to the pool of a graph, of compiled code
    that warms up or of ``torch.cuda.use_mem_pool``, those of another thread do not.
    """

    def make() -> Tensor:
        with torch.cuda.device(device):
            made = torch.zeros(count, dtype=torch.int32, device=device)
            torch.cuda.current_stream(device).synchronize()
        return made

    with ThreadPoolExecutor(1, "lorafast counters") as thread:
        return thread.submit(make).result()


def _stream(device: torch.device) -> int:
    """The handle of the current stream, without an object of PyTorch's around it."""
    handle: int = torch._C._cuda_getCurrentRawStream(device.index)
    return handle
