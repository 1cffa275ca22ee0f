"""A problem over a weight that isn't stored dense, as the same one over a dense weight.

W is made dense by one launch, in memory that all layers share (``workspace``), and multiplied at once.
"""

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafast import operands
from lorafast.backends import workspace
from lorafast.backends.plan import Plan
from lorafast.core.problem import DENSE, WEIGHT_NORM, Layout, Problem
from lorafast.operands import Weight

Dequantize = Callable[[Weight, Tensor], None]
"""Writes W into a contiguous matrix ``[N, K]`` of its dtype."""

_POSITION = {
    "linear_expand": 1, "lora_linear": 1, "lora_linear_backward": 2, "grouped_lora_linear": 1,
    "grouped_lora_linear_backward": 2, WEIGHT_NORM: 0,
}  # fmt: skip
"""Of the weight, among what a plan's ``run`` takes."""
_BACKWARDS = ("lora_linear_backward", "grouped_lora_linear_backward")


class _Kept(NamedTuple):
    """W made dense, and what it was made of: held, so that nothing else has its addresses meanwhile."""

    W: Tensor
    stored: list[Tensor]
    versions: list[int]


class _Keeping:
    """Weights made dense while a forward is computed again, until its backward takes them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._most = 0
        self._kept: dict[Hashable, _Kept] = {}

    def allow(self, most: int) -> int:
        """Keeps up to so many bytes from now on; returns what was allowed before."""
        with self._lock:
            before, self._most = self._most, most
            if not most:
                self._kept.clear()
            return before

    def wants(self, nbytes: int) -> bool:
        """Whether a weight of that size, made dense now, should be kept; makes room for it."""
        if not self._most or torch._C._current_graph_task_id() == _NO_BACKWARD:
            return False
        with self._lock:
            if nbytes > self._most:
                return False
            # What came first is taken last, if at all: dx of a first layer may not be asked for.
            while sum(kept.W.nbytes for kept in self._kept.values()) + nbytes > self._most:
                del self._kept[next(iter(self._kept))]
            return True

    def keep(self, weight: Weight, W: Tensor) -> None:
        """Until ``taken``, or until nothing is allowed any more."""
        stored = operands.stored(weight)
        with self._lock:
            self._kept[_key(weight, W.dtype)] = _Kept(W, stored, [t._version for t in stored])

    def taken(self, weight: Weight, dtype: torch.dtype) -> Tensor | None:
        """What is kept of the weight, which is forgotten here; None if nothing is."""
        if not self._kept:
            return None
        with self._lock:
            kept = self._kept.pop(_key(weight, dtype), None)
        if kept is None or kept.versions != [t._version for t in kept.stored]:
            return None
        return kept.W


def _key(weight: Weight, dtype: torch.dtype) -> Hashable:
    stored = operands.stored(weight)
    # The memory of a storage may be freed while a tensor holds it, as FSDP does.
    places = ((t.untyped_storage()._cdata, t.data_ptr()) for t in stored)
    return dtype, operands.describe(weight), *places


_NO_BACKWARD = -1
_keeping = _Keeping()


@contextlib.contextmanager
def keep_dequantized(most_bytes: int) -> Iterator[None]:
    """Within the block, backwards that compute forwards again (activation checkpointing) make a
    quantized weight dense once: what the forward made is kept until that layer's ``dx``, up to
    ``most_bytes`` in all.

    Without, each product makes it anew, and no second weight is in memory. It is for GPUs; the CPU
    kernels make parts of W dense, which stay in the caches. Enter it around ``backward()``.

    Raises:
        ValueError: ``most_bytes`` is no positive int.
    """
    if not isinstance(most_bytes, int) or most_bytes <= 0:
        raise ValueError(f"most_bytes is {most_bytes!r}, expected a positive number of bytes")
    before = _keeping.allow(most_bytes)
    try:
        yield
    finally:
        _keeping.allow(before)


def dense(problem: Problem) -> Problem:
    """The problem once its weight is dense: contiguous, of the problem's dtype."""
    fresh = Layout.fresh(problem.N, problem.K, problem.dtype)
    return problem._replace(
        format=DENSE, format_parameters="", layouts=problem.layouts._replace(weight=fresh)
    )


def reads_weight(problem: Problem) -> bool:
    """Whether a result that is wanted depends on the weight."""
    if problem.operation in _BACKWARDS:
        return "dx" in problem.wants
    return problem.operation in _POSITION


def plan(problem: Problem, dequantize: Dequantize, product: Plan, line: str) -> Plan:
    """``product``, the plan of ``dense(problem)``, behind a launch that makes W dense, which ``line``
    describes. The seconds are the product's: the caller adds what the launch takes."""
    if not reads_weight(problem):
        return product
    if product.differentiable:
        raise ValueError(
            "the product is differentiable: PyTorch would keep W, whose memory is shared"
        )
    N, K, dtype = problem.N, problem.K, problem.dtype
    position, run = _POSITION[problem.operation], product.run
    backward = problem.transposed or problem.operation in _BACKWARDS
    # The norm is a forward's, which dx doesn't take again.
    keeps = not backward and problem.operation != WEIGHT_NORM

    def of_dense(*arguments: Any) -> Any:
        weight, before, behind = (
            arguments[position],
            arguments[:position],
            arguments[position + 1 :],
        )
        W = _keeping.taken(weight, dtype) if backward else None
        if W is not None:
            return run(*before, W, *behind)
        if keeps and _keeping.wants(N * K * dtype.itemsize):
            W = torch.empty((N, K), dtype=dtype, device=weight.device)
            dequantize(weight, W)
            _keeping.keep(weight, W)
            return run(*before, W, *behind)
        with workspace.borrowed(N, K, dtype, weight.device) as W:
            dequantize(weight, W)
            return run(*before, W, *behind)

    return replace(product, run=of_dense, launches=(line, *product.launches), ahead=None)
