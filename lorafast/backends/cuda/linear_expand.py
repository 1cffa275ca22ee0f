"""``csrc/cuda/linear_expand.cu``: the frozen GEMM with the low-rank term in its accumulator.

A CTA has a tile of y and multiplies by ``mma.sync``, which is the whole speed of tensor cores up to
sm_89 and on sm_120. Where tiles are few, K is cut: the parts are added up in a fixed order, by the CTA
of a tile that ends last.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafast.backends.cost import Device
from lorafast.backends.cuda.launch import Launch
from lorafast.backends.cuda.tables import LINEAR_EXPAND, GemmTile, row_of
from lorafast.core.dtypes import wide
from lorafast.core.problem import DENSE, Problem
from lorafast.kernels.common.counters import counters
from lorafast.reference.dropout import survivor_scale, threshold

_OLDEST = 80
_WGMMA = range(90, 120)
"""Compute capabilities whose tensor cores reach their speed by other instructions alone."""
_DTYPES = (torch.bfloat16, torch.float16)
_ROWS = 128
"""Of a tile."""
_MOST_RANKS = 2**20
_MOST_K = 2**28
_MOST_CTAS = 2**31 - 1
_ALIGNED = 16

_MOST_SPLITS = 16
_LEAST_DEPTH = 256
"""Elements of K that a share has at least."""
_PARTS = 9e10
"""Bytes a second at which the last CTA of a tile adds up parts, from L2. Assumed, not measured."""


@dataclass(frozen=True)
class Shares:
    """How a launch is cut: tiles of 128 rows and ``tile.columns``, each in ``splits`` shares of K."""

    tile: GemmTile
    down: int
    across: int
    splits: int

    @property
    def tiles(self) -> int:
        """Of y."""
        return self.down * self.across

    @property
    def partials(self) -> int:
        """Elements of scratch memory."""
        return self.tiles * self.splits * _ROWS * self.tile.columns if self.splits > 1 else 0


def plan_linear_expand(problem: Problem, device: Device) -> Launch | str:
    """``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias``, transposed ``dx``, or why there is no launch."""
    p = problem
    reason = why_refused(p, device)
    if reason is not None:
        return reason
    N, depth = _sizes(p)
    shares = shares_of(p.M, depth, N, device)
    size, low = p.dtype.itemsize, wide(p.dtype).itemsize
    moved = (p.M * p.K + p.N * p.K + p.M * p.N) * size + p.M * p.r * low
    cut = f", K in {shares.splits}" if shares.splits > 1 else ""
    return Launch(
        _run(p, N, shares),
        f"linear_expand: {shares.down} x {shares.across} tiles of {_ROWS} x {shares.tile.columns}{cut}",
        2.0 * p.M * N * (depth + p.r),
        float(moved + N * p.r * p.adapter_dtype.itemsize + 8 * shares.partials),
    )


def why_refused(p: Problem, device: Device) -> str | None:
    """Why the kernel can't serve a ``linear_expand``, a sentence, or None."""
    has = ".".join(map(str, divmod(device.capability, 10)))
    N, depth = _sizes(p)
    x, name = (p.layouts.dy, "dy") if p.transposed else (p.layouts.x, "x")
    weight = p.layouts.weight
    if device.capability < _OLDEST:
        return f"the fused linear_expand needs compute capability 8.0, this is {has}"
    if device.capability in _WGMMA:
        return f"the fused linear_expand multiplies by mma.sync, too slow for compute capability {has}"
    if p.format != DENSE:
        return f"the weight is stored as {p.format}, the fused linear_expand reads a dense one"
    if p.dtype not in _DTYPES:
        return f"{name} has dtype {p.dtype}, the fused linear_expand takes bfloat16 and float16"
    if not 1 <= p.r < _MOST_RANKS:
        return f"r is {p.r}, the fused linear_expand takes 1 to {_MOST_RANKS - 1}"
    if depth >= _MOST_K:
        return f"the sums have {depth} terms, in the fused linear_expand fewer than {_MOST_K}"
    if -(-p.M // _ROWS) * -(-N // _narrowest(device)) > _MOST_CTAS:
        return f"the result is {p.M} x {N}, more than {_MOST_CTAS} tiles"
    if x.rows < _ALIGNED:
        return f"the rows of {name} aren't aligned to 16 bytes, as the fused linear_expand reads them"
    if max(weight.rows, weight.columns) < _ALIGNED:
        return (
            "neither rows nor columns of the weight are aligned to 16 bytes, as the fused "
            "linear_expand reads them"
        )
    return None


def _sizes(p: Problem) -> tuple[int, int]:
    """Columns of the result, and terms of its sums."""
    return (p.K, p.N) if p.transposed else (p.N, p.K)


def _narrowest(device: Device) -> int:
    return min(tile.columns for tile in row_of(LINEAR_EXPAND, device.capability))


def shares_of(M: int, K: int, N: int, device: Device) -> Shares:
    """Of the tiles and shares that there are, those that end first."""
    return min(_possible(M, K, N, device), key=lambda shares: seconds(shares, K, device))


def _possible(M: int, K: int, N: int, device: Device) -> Iterator[Shares]:
    for tile in row_of(LINEAR_EXPAND, device.capability):
        down, across = -(-M // _ROWS), -(-N // tile.columns)
        most = max(1, min(_MOST_SPLITS, K // _LEAST_DEPTH, device.sms * tile.resident))
        for splits in range(1, most + 1):
            # A cut tile is added up by one CTA: more of them than run at once gain nothing.
            if splits == 1 or down * across * splits <= device.sms * tile.resident:
                yield Shares(tile, down, across, splits)


def seconds(shares: Shares, K: int, device: Device) -> float:
    """What the SM with the most tiles takes. Whether memory keeps up is not asked."""
    tile, ctas = shares.tile, shares.tiles * shares.splits
    of_one = 2.0 * _ROWS * tile.columns * -(-K // shares.splits)
    rate = device.flops * tile.rate / device.sms
    found = -(-ctas // device.sms) * (of_one / rate + tile.around)
    if shares.splits > 1:
        found += (shares.splits + 1) * _ROWS * tile.columns * 4 / _PARTS
    return found


def _run(p: Problem, N: int, shares: Shares) -> Any:
    M, dtype, masked, transposed = p.M, p.dtype, p.dropout, p.transposed
    tiles, columns, splits, parts = shares.tiles, shares.tile.columns, shares.splits, shares.partials

    def run(
        x: Tensor,
        weight: Tensor,
        s: Tensor,
        lora_B: Tensor,
        scaling: float,
        bias: Tensor | None = None,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> Tensor:
        y = torch.empty((M, N), dtype=dtype, device=x.device)
        partials = used = None
        if parts:
            partials = torch.empty(parts, dtype=torch.float32, device=x.device)
            used = counters(x, tiles)
        mask = (seed, threshold(dropout_p), survivor_scale(dropout_p)) if masked else _NO_MASK
        torch.ops.lorafast_cuda.linear_expand.default(
            x, weight.t() if transposed else weight, s, lora_B, float(scaling), bias, *mask, y,
            partials, used, columns, splits,
        )  # fmt: skip
        return y

    return run


_NO_MASK = None, 0, 1.0
