"""Bytes of our Triton kernels in closed form, and stand-ins of their launchers that add them up.

A kernel's *traffic* counts every byte that a launch touches once, reading and writing: what goes
through device memory if the cache keeps what programs of one launch share. Its *requests* are what the
programs load and store, shared tiles again each time: what the cache has to serve. Both follow from
the loops of ``kernels/<op>/kernel.py``; ``interpret`` counts them there and holds them against this.
Flags and counters, a few bytes, are left out.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from lorafast.kernels.common.configs import LaunchConfig, chunks, split_k
from lorafast.kernels.common.plan import (
    Helpers,
    backward_helpers,
    forward_helpers,
    group_rows,
    may_help,
)
from torch import Tensor

from lorafast.kernels import tables
from lorafast.ops import backend, dispatch, on_gpu
from lorafast.reference import wide

H200_PROCESSORS = 132
H200_CAPABILITY = 90
_SEED = 8
_PARTIAL = 4


@dataclass(frozen=True)
class Launch:
    """One kernel: bytes read and written, each once, and bytes loaded and stored by its programs.

    ``ridden`` of those read are what helpers read beside the product's own tiles: they are counted once,
    but nothing makes sure that the cache still has them when the other comes.
    """

    read: int
    written: int
    loaded: int
    stored: int
    ridden: int = 0


@dataclass(frozen=True)
class Layer:
    """A layer as the kernels see it; sizes of elements in bytes."""

    M: int
    K: int
    N: int
    r: int
    dtype: torch.dtype
    adapter_size: int
    bias: bool
    dropout: bool
    processors: int = H200_PROCESSORS

    @property
    def low_rank_size(self) -> int:
        """Of an element of s and ds."""
        return wide(self.dtype).itemsize

    @property
    def size(self) -> int:
        """Of an element of the activations."""
        return self.dtype.itemsize

    def config(self, operation: str, K: int, N: int) -> LaunchConfig:
        """What serves ``operation`` on contiguous tensors."""
        bulk = K * self.size % 16 == 0 and N * self.size % 16 == 0
        return tables.find(operation, H200_CAPABILITY, self.dtype, self.M, K, N, self.r, bulk)


def shrink(p: Layer) -> list[Launch]:
    """Every row block reads A, every rank block reads x."""
    c = p.config("shrink", p.K, p.K)
    rows, ranks = _blocks(p.M, c.block_m), _blocks(p.r, c.block_r)
    count, _ = chunks(p.processors * c.ctas_per_sm, p.K, c.block_k, rows * ranks)
    x, A, s = p.M * p.K * p.size, p.r * p.K * p.adapter_size, p.M * p.r * p.low_rank_size
    seed = _SEED if p.dropout else 0
    partials = _partials(count, p.M * p.r)
    return [
        Launch(
            x + A + seed + partials,
            s + partials,
            ranks * x + rows * A + rows * count * ranks * seed + partials,
            s + partials,
        )
    ]


def linear_expand(p: Layer, K: int, N: int, *, bias: bool, dropout: bool) -> list[Launch]:
    """``[M, K] · [K, N]``: every column block reads x and s, every row block reads W, B and the bias."""
    c = p.config("linear_expand", K, N)
    rows, cols = _blocks(p.M, c.block_m), _blocks(N, c.block_n)
    splits = split_k(p.processors, rows * cols, _blocks(K, c.block_k))
    partials = _partials(splits, p.M * N)
    tiles = _tiles(p, c, K, N, bias=bias, dropout=dropout)
    return [
        Launch(
            tiles.read + partials,
            tiles.written + partials,
            tiles.loaded + partials,
            tiles.stored + partials,
        )
    ]


def _tiles(p: Layer, c: LaunchConfig, K: int, N: int, *, bias: bool, dropout: bool) -> Launch:
    """All tiles of a product with their low-rank term; under a mask each part of a tile reads s and the
    seed for itself."""
    rows, cols = _blocks(p.M, c.block_m), _blocks(N, c.block_n)
    x, s, y = p.M * K * p.size, p.M * p.r * p.low_rank_size, p.M * N * p.size
    by_cols = N * K * p.size + N * p.r * p.adapter_size + (N * p.size if bias else 0)
    parts = c.masked_parts if dropout else 1
    seed = _SEED if dropout else 0
    # A part beyond the last column loads nothing of B, but its rows of s.
    loaded = cols * (x + parts * s) + rows * by_cols + rows * cols * parts * seed
    return Launch(x + s + by_cols + seed, y, loaded, y)


def expand_backward(p: Layer) -> list[Launch]:
    """Every column group reads s, every row group reads B, every rank block reads dy."""
    c = p.config("expand_backward", p.N, p.N)
    cols, ranks = _blocks(p.N, c.block_n), _blocks(p.r, c.block_r)
    groups, _ = chunks(p.processors * c.ctas_per_sm, p.M, c.block_m, cols * ranks)
    of_ds, ds = cols * p.M * p.r * _PARTIAL, p.M * p.r * p.low_rank_size
    return [_expand_backward(p, cols, groups, ranks), Launch(of_ds, ds, of_ds, ds)]


def _expand_backward(p: Layer, cols: int, groups: int, ranks: int) -> Launch:
    """Without adding up ds."""
    dy, s = p.M * p.N * p.size, p.M * p.r * p.low_rank_size
    B = p.N * p.r * p.adapter_size
    of_ds, of_dB = cols * p.M * p.r * _PARTIAL, groups * p.N * p.r * _PARTIAL
    written = of_ds + of_dB + B
    return Launch(dy + s + B + of_dB, written, ranks * dy + cols * s + groups * B + of_dB, written)


def shrink_backward(p: Layer) -> list[Launch]:
    """Every column block reads ds, every rank block reads x."""
    c = p.config("shrink_backward", p.K, p.K)
    cols, ranks = _blocks(p.K, c.block_k), _blocks(p.r, c.block_r)
    count, _ = chunks(p.processors * c.ctas_per_sm, p.M, c.block_m, cols * ranks)
    x, ds, dA = p.M * p.K * p.size, p.M * p.r * p.low_rank_size, p.r * p.K * p.adapter_size
    seed = _SEED if p.dropout else 0
    partials = _partials(count, p.r * p.K)
    return [
        Launch(
            x + ds + seed + partials,
            dA + partials,
            ranks * x + cols * ds + cols * count * ranks * seed + partials,
            dA + partials,
        )
    ]


def lora_linear(p: Layer) -> list[Launch]:
    """One launch if helpers pay, else two."""
    c = p.config("lora_linear", p.K, p.N)
    if _forward_helpers(p, c) is None:
        return shrink(p) + linear_expand(p, p.K, p.N, bias=p.bias, dropout=False)
    tiles = _tiles(p, c, p.K, p.N, bias=p.bias, dropout=False)
    x, A, s = p.M * p.K * p.size, p.r * p.K * p.adapter_size, p.M * p.r * p.low_rank_size
    rows = _blocks(p.M, c.block_m)
    return [
        Launch(tiles.read + A, tiles.written + s, tiles.loaded + x + rows * A, tiles.stored + s, x)
    ]


def lora_linear_backward(p: Layer) -> list[Launch]:
    """One launch if helpers pay, two with dropout; else three."""
    c = p.config("lora_linear_backward", p.N, p.K)
    if _backward_helpers(p, c) is None:
        return [
            *expand_backward(p),
            *shrink_backward(p),
            *linear_expand(p, p.N, p.K, bias=False, dropout=p.dropout),
        ]
    tiles = _tiles(p, c, p.N, p.K, bias=False, dropout=p.dropout)
    eb = p.config("expand_backward", p.N, p.N)
    groups, cols = _blocks(p.M, group_rows(c)), _blocks(p.N, eb.block_n)
    thin = _expand_backward(p, cols, groups, 1)
    dy, s = p.M * p.N * p.size, p.M * p.r * p.low_rank_size
    # dy is read by both; ds is added up there, written and read.
    of_ds = cols * p.M * p.r * _PARTIAL
    read = tiles.read + thin.read - dy + of_ds
    written = tiles.written + thin.written + s
    loaded = tiles.loaded + thin.loaded + of_ds
    if not p.dropout:
        sb = p.config("shrink_backward", p.K, p.K)
        x, dA = p.M * p.K * p.size, p.r * p.K * p.adapter_size
        read, written = read + x, written + dA
        loaded += x + _blocks(p.K, sb.block_k) * s
    launch = Launch(read, written, loaded, written, dy)
    return [launch, *shrink_backward(p)] if p.dropout else [launch]


def _forward_helpers(p: Layer, c: LaunchConfig) -> Helpers | None:
    if not may_help(p.dtype):
        return None
    thin = p.config("shrink", p.K, p.K)
    return forward_helpers(c, thin, p.M, p.K, p.N, p.r, p.size, p.dropout, p.processors)


def _backward_helpers(p: Layer, c: LaunchConfig) -> Helpers | None:
    if not may_help(p.dtype):
        return None
    rows, cols = p.config("expand_backward", p.N, p.N), p.config("shrink_backward", p.K, p.K)
    return backward_helpers(c, rows, cols, p.M, p.K, p.N, p.r, p.size, p.dropout, p.processors)


def _partials(count: int, size: int) -> int:
    """Bytes of the partial sums of ``size`` elements; one is none."""
    return count * size * _PARTIAL if count > 1 else 0


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


class _StandIns:
    """The launchers on meta tensors: allocate what the real ones return, note what they move."""

    def __init__(self, processors: int, note: Callable[[list[Launch]], None]) -> None:
        self._processors = processors
        self._note = note

    def _layer(
        self, x: Tensor, K: int, N: int, r: int, adapter_size: int, bias: bool, dropout: bool
    ) -> Layer:
        M = x.shape[0]
        return Layer(M, K, N, r, x.dtype, adapter_size, bias, dropout, self._processors)

    def shrink(
        self, x: Tensor, lora_A: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None
    ) -> Tensor:
        r, K = lora_A.shape
        self._note(shrink(self._layer(x, K, K, r, lora_A.itemsize, False, bool(dropout_p))))
        return x.new_empty((x.shape[0], r), dtype=wide(x.dtype))

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
        p = self._layer(x, K, N, r, lora_B.itemsize, bias is not None, bool(dropout_p))
        self._note(linear_expand(p, K, N, bias=p.bias, dropout=p.dropout))
        return x.new_empty((M, N))

    def expand_backward(
        self, dy: Tensor, s: Tensor, lora_B: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        N, r = lora_B.shape
        self._note(expand_backward(self._layer(dy, N, N, r, lora_B.itemsize, False, False)))
        return s.new_empty((dy.shape[0], r)), lora_B.new_empty((N, r))

    def shrink_backward(
        self,
        ds: Tensor,
        x: Tensor,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        K, r, dtype = x.shape[1], ds.shape[1], dtype or x.dtype
        p = self._layer(x, K, K, r, dtype.itemsize, False, bool(dropout_p))
        self._note(shrink_backward(p))
        return x.new_empty((r, K), dtype=dtype)

    def lora_linear(
        self,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        bias: Tensor | None = None,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        (N, K), r = weight.shape, lora_A.shape[0]
        p = self._layer(x, K, N, r, lora_A.itemsize, bias is not None, bool(dropout_p))
        self._note(lora_linear(p))
        return x.new_empty((x.shape[0], N)), x.new_empty((x.shape[0], r), dtype=wide(x.dtype))

    def lora_linear_backward(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        s: Tensor,
        scaling: float,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        (N, K), r = weight.shape, lora_A.shape[0]
        p = self._layer(x, K, N, r, lora_A.itemsize, False, bool(dropout_p))
        self._note(lora_linear_backward(p))
        return x.new_empty(x.shape), torch.empty_like(lora_A), torch.empty_like(lora_B)


@contextlib.contextmanager
def standing_in(processors: int, note: Callable[[list[Launch]], None]) -> Iterator[None]:
    """Within the block the backend ``triton`` launches nothing, runs on any device, and is counted; the
    automatic choice is that on an H200 on which nothing was tuned."""
    stand_ins = _StandIns(processors, note)

    class Counted(backend.Backend):
        def implementation(self, operation: str) -> Callable[..., object]:
            function: Callable[..., object] = getattr(stand_ins, operation)
            return function

    fields = {f.name: getattr(backend.TRITON, f.name) for f in dataclasses.fields(backend.TRITON)}
    fields |= {"why_unusable": lambda: None, "why_refused": lambda operation, tensors: None}
    with (
        mock.patch.dict(backend.BACKENDS, triton=Counted(**fields)),
        mock.patch.object(dispatch, "automatic_choice", on_gpu.choice),
        mock.patch.object(dispatch, "automatic_whole", on_gpu.whole),
        mock.patch.object(on_gpu, "_processor", return_value=(H200_CAPABILITY, processors)),
        mock.patch.object(on_gpu, "_record", return_value=None),
    ):
        yield
