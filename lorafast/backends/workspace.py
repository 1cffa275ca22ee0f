"""Memory that calls share, one after another: a weight made dense for one product at a time."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorafast.core.device_memory import lasting


@dataclass
class _Workspace:
    """Of one stream. Whoever launches something over it holds the lock until the last launch is in the
    stream: in between another thread's would write the same bytes."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    stream: torch.Stream | None = None
    memory: Tensor | None = None
    used: bool = False


_workspaces: dict[tuple[torch.device, int], _Workspace] = {}
_adding = threading.Lock()


@contextlib.contextmanager
def borrowed(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """A contiguous matrix ``[rows, columns]`` without values, until the end of the block.

    There is one piece of memory for each stream of a device, as large as the largest matrix so far. What
    is launched within the block may go on reading it: the next to write it are launches of the same
    stream. A second one within the block, and one that a CUDA graph records, is memory of its own. So is
    one of another thread on a CPU, whose products end within their blocks: waiting would take as long.
    """
    if _is_recorded(device):
        yield torch.empty((rows, columns), dtype=dtype, device=device)
        return
    space = _of(device)
    if not space.lock.acquire(blocking=device.type == "cuda"):
        yield torch.empty((rows, columns), dtype=dtype, device=device)
        return
    try:
        if space.used:
            yield torch.empty((rows, columns), dtype=dtype, device=device)
            return
        space.used = True
        try:
            yield _matrix(space, rows, columns, dtype, device)
        finally:
            space.used = False
    finally:
        space.lock.release()


def held() -> int:
    """Bytes of all workspaces."""
    return sum(w.memory.nbytes for w in tuple(_workspaces.values()) if w.memory is not None)


def release() -> None:
    """Gives the memory of all workspaces back to the allocators; the next call takes it anew."""
    for space in tuple(_workspaces.values()):
        with space.lock:
            _drop(space)


def _drop(space: _Workspace) -> None:
    """Gives its memory back, once its stream is done with it."""
    if space.memory is not None and space.stream is not None:
        space.memory.record_stream(space.stream)
    space.memory = None


def _matrix(
    space: _Workspace, rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    needed = rows * columns * dtype.itemsize
    if space.memory is None or space.memory.numel() < needed:
        _drop(space)  # before the larger one is taken
        space.memory = lasting(
            lambda: torch.empty(needed, dtype=torch.uint8, device=device), device
        )
    return space.memory[:needed].view(dtype).view(rows, columns)


def _is_recorded(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _of(device: torch.device) -> _Workspace:
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    key = device, 0 if stream is None else stream.cuda_stream
    with _adding:
        return _workspaces.setdefault(key, _Workspace(stream=stream))
