"""Counters and flags by which the programs of one launch find each other.

A kernel finds them zero and leaves them zero: whoever comes last puts them back. So nothing is cleared
between launches, and one piece of memory serves every launch of a stream.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

_fresh: ContextVar[bool] = ContextVar("fresh", default=False)
_cleared: dict[tuple[torch.device, int], Tensor] = {}


def counters(x: Tensor, count: int) -> Tensor:
    """At least ``count`` int32 zeros for one launch on the device and the current stream of ``x``."""
    if not x.is_cuda:
        return torch.zeros(count, dtype=torch.int32, device=x.device)
    if _fresh.get() or torch.cuda.is_current_stream_capturing():
        # A graph has its own, cleared by every replay: it may run beside another one, on any stream.
        return torch.zeros(count, dtype=torch.int32, device=x.device)
    key = (x.device, torch.cuda.current_stream(x.device).cuda_stream)
    kept = _cleared.get(key)
    if kept is None or kept.numel() < count:
        kept = torch.zeros(max(count, 4096), dtype=torch.int32, device=x.device)
        _cleared[key] = kept
    return kept


@contextlib.contextmanager
def fresh() -> Iterator[None]:
    """Within the block none are kept: compiled code warms its graphs up on the graph's memory."""
    token = _fresh.set(True)
    try:
        yield
    finally:
        _fresh.reset(token)
