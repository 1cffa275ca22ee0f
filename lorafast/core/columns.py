"""The part of W's columns that this rank has, while it computes a layer whose K is shared by several.

A norm along K is then a sum over ranks, and a mask of x is one of the rank's own. Who shares K between
ranks (``lorafast.parallel``) says so around the layer's forward; all that reads it asks ``current``.
"""

import threading
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

_ODD = 0x1E3779B97F4A7C15
"""What seeds of neighbouring parts differ by in many bits; below 2⁶²."""
_POSITIVE = 2**63 - 1


class Columns(NamedTuple):
    """One of several parts of K."""

    place: int
    """Which one, from 0."""
    total: Callable[[Tensor], Tensor]
    """The sum of a tensor over all parts, without a gradient."""

    def seed(self, seed: Tensor) -> Tensor:
        """Another seed for each part, from one that all have drawn alike, int64 ``[1]``: the masks are
        independent of one another, and the same whenever the same is drawn. The first part's is
        ``seed``."""
        return seed ^ (self.place * _ODD & _POSITIVE) if self.place else seed

    def norm(self, norm: Tensor, least: float) -> Tensor:
        """``‖row‖`` of all columns from that of each part, ``[N]``, at least ``least``."""
        return self.total(norm.square()).sqrt().clamp_min(least)


class _Current(threading.local):
    def __init__(self) -> None:
        self.columns: Columns | None = None


_current = _Current()


def current() -> Columns | None:
    """The part that the layer has whose forward this is; None if it has all of K."""
    return _current.columns


def enter(columns: Columns | None) -> Columns | None:
    """Says what ``current`` is from now on in this thread; what it was."""
    before, _current.columns = _current.columns, columns
    return before
