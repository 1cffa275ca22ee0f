"""Bytes of our Triton kernels in closed form, and stand-ins of their launchers that add them up.

A kernel's *traffic* counts every byte that a launch touches once, reading and writing: what goes
through device memory if the cache keeps what neighbouring programs share. Its *requests* are what the
programs load and store, shared tiles again each time: what the cache has to serve. Both follow from
the loops of ``kernels/<op>/kernel.py``; ``interpret`` counts them there and holds them against this.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from lorafast.kernels.common.configs import chunks, config_for
from torch import Tensor

from lorafast.ops import backend

H200_PROCESSORS = 132
_SEED = 8
_PARTIAL = 4


@dataclass(frozen=True)
class Launch:
    """One kernel: bytes read and written, each once, and bytes loaded and stored by its programs."""

    read: int
    written: int
    loaded: int
    stored: int


def sum_partials(count: int, size: int, element_size: int) -> Launch:
    """``count`` float32 partials of ``size`` elements into one."""
    read, written = count * size * _PARTIAL, size * element_size
    return Launch(read, written, read, written)


def shrink(
    M: int, K: int, r: int, size: int, adapter_size: int, dropout: bool, processors: int
) -> list[Launch]:
    """Every row block reads A, every rank block reads x."""
    c = config_for("shrink", r, size)
    rows, ranks = _blocks(M, c.block_m), _blocks(r, c.block_r)
    count, _ = chunks(processors, K, c.block_k, rows * ranks)
    x, A = M * K * size, r * K * adapter_size
    seed = _SEED if dropout else 0
    written = M * r * size if count == 1 else count * M * r * _PARTIAL
    launch = Launch(
        x + A + seed, written, ranks * x + rows * A + rows * count * ranks * seed, written
    )
    return [launch] if count == 1 else [launch, sum_partials(count, M * r, size)]


def linear_expand(
    M: int, K: int, N: int, r: int, size: int, adapter_size: int, bias: bool, dropout: bool
) -> list[Launch]:
    """Every column block reads x and s, every row block reads W, B and the bias."""
    c = config_for("linear_expand", r, size)
    rows, cols = _blocks(M, c.block_m), _blocks(N, c.block_n)
    by_rows = (M * K + M * r) * size
    by_cols = N * K * size + N * r * adapter_size + (N * size if bias else 0)
    seed = _SEED if dropout else 0
    y = M * N * size
    loaded = cols * by_rows + rows * by_cols + rows * cols * seed
    return [Launch(by_rows + by_cols + seed, y, loaded, y)]


def expand_backward(
    M: int, N: int, r: int, size: int, adapter_size: int, processors: int
) -> list[Launch]:
    """Every column block reads s, every row chunk reads B, every rank block reads dy."""
    c = config_for("expand_backward", r, size)
    cols, ranks = _blocks(N, c.block_n), _blocks(r, c.block_r)
    count, _ = chunks(processors, M, c.block_m, cols * ranks)
    dy, s, B = M * N * size, M * r * size, N * r * adapter_size
    written = (cols * M + count * N) * r * _PARTIAL
    return [
        Launch(dy + s + B, written, ranks * dy + cols * s + count * B, written),
        sum_partials(cols, M * r, size),
        sum_partials(count, N * r, adapter_size),
    ]


def shrink_backward(
    M: int, K: int, r: int, size: int, adapter_size: int, dropout: bool, processors: int
) -> list[Launch]:
    """Every column block reads ds, every rank block reads x."""
    c = config_for("shrink_backward", r, size)
    cols, ranks = _blocks(K, c.block_k), _blocks(r, c.block_r)
    count, _ = chunks(processors, M, c.block_m, cols * ranks)
    x, ds = M * K * size, M * r * size
    seed = _SEED if dropout else 0
    written = r * K * adapter_size if count == 1 else count * r * K * _PARTIAL
    launch = Launch(
        x + ds + seed, written, ranks * x + cols * ds + cols * count * ranks * seed, written
    )
    return [launch] if count == 1 else [launch, sum_partials(count, r * K, adapter_size)]


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


class _StandIns:
    """The four launchers on meta tensors: allocate what the real ones return, note what they move."""

    def __init__(self, processors: int, note: Callable[[list[Launch]], None]) -> None:
        self._processors = processors
        self._note = note

    def shrink(
        self, x: Tensor, lora_A: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None
    ) -> Tensor:
        (M, K), r = x.shape, lora_A.shape[0]
        self._note(shrink(M, K, r, x.itemsize, lora_A.itemsize, bool(dropout_p), self._processors))
        return x.new_empty((M, r))

    def linear_expand(
        self,
        x: Tensor,
        weight: Tensor,
        s: Tensor,
        lora_B: Tensor,
        scaling: float,
        bias: Tensor | None = None,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> Tensor:
        (M, K), (N, r) = x.shape, lora_B.shape
        self._note(
            linear_expand(
                M, K, N, r, x.itemsize, lora_B.itemsize, bias is not None, bool(dropout_p)
            )
        )
        return x.new_empty((M, N))

    def expand_backward(
        self, dy: Tensor, s: Tensor, lora_B: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        (M, N), r = dy.shape, lora_B.shape[1]
        self._note(expand_backward(M, N, r, dy.itemsize, lora_B.itemsize, self._processors))
        return dy.new_empty((M, r)), lora_B.new_empty((N, r))

    def shrink_backward(
        self,
        ds: Tensor,
        x: Tensor,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        (M, K), r = x.shape, ds.shape[1]
        dtype = dtype or x.dtype
        self._note(
            shrink_backward(M, K, r, x.itemsize, dtype.itemsize, bool(dropout_p), self._processors)
        )
        return x.new_empty((r, K), dtype=dtype)


@contextlib.contextmanager
def standing_in(processors: int, note: Callable[[list[Launch]], None]) -> Iterator[None]:
    """Within the block the backend ``triton`` launches nothing, runs on any device, and is counted."""
    stand_ins = _StandIns(processors, note)

    class Counted(backend.Backend):
        def implementation(self, operation: str) -> Callable[..., object]:
            function: Callable[..., object] = getattr(stand_ins, operation)
            return function

    fields = {f.name: getattr(backend.TRITON, f.name) for f in dataclasses.fields(backend.TRITON)}
    fields |= {"why_unusable": lambda: None, "why_refused": lambda operation, tensors: None}
    with mock.patch.dict(backend.BACKENDS, triton=Counted(**fields)):
        yield
