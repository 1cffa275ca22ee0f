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

from lorafast.backends.cost import LAUNCH_SECONDS, Device
from lorafast.backends.cuda import gemm
from lorafast.backends.cuda.gemm import Gemm, sizes_of
from lorafast.backends.cuda.launch import NONE, Choices, Launch, mask_of
from lorafast.backends.cuda.tables import LINEAR_EXPAND, ROWS, GemmTile, row_of
from lorafast.core.dtypes import wide
from lorafast.core.problem import Problem
from lorafast.kernels.common.counters import counters

_OLDEST = 80
_WGMMA = range(90, 120)
"""Compute capabilities whose tensor cores reach their speed by other instructions alone."""
_SINGLE = 128
"""Columns of the tiles that there are in float32."""
_GEMM = Gemm(
    "the fused linear_expand",
    (torch.bfloat16, torch.float16, torch.float32),
    (0, 2**28 - 1),
    ROWS,
    _SINGLE,
)

_AROUND = 1.2e-6
"""Seconds of a tile before and after its main loop, that another CTA of the SM may hide. Assumed."""
_MASK = 9.5e-11
"""The same of making an element's mask: 4,400 clocks of an A100 for a wide tile's, counted."""
_FEW = 2
"""Tiles an SM, below which K is cut: parts are scratch memory of the size of twice y or more."""
_MOST_SPLITS = 16
_LEAST_DEPTH = 256
"""Elements of K that a share has at least."""
_PARTS = 9e10
"""Bytes a second at which a CTA leaves its part, and the last one of a tile adds them up, in L2.
Assumed, not measured."""


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
        return self.tiles * self.splits * ROWS * self.tile.columns if self.splits > 1 else 0


def plan_linear_expand(problem: Problem, device: Device, fixed: Choices = NONE) -> Launch | str:
    """``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias``, transposed ``dx``, or why there is no launch."""
    p = problem
    reason = why_refused(p, device)
    if reason is not None:
        return reason
    N, shares = sizes_of(p)[0], shares_of(p, device, fixed)
    cut = f", K in {shares.splits}" if shares.splits > 1 else ""
    return Launch(
        _run(p, N, shares),
        f"linear_expand: {shares.down} x {shares.across} tiles of {ROWS} x {shares.tile.columns}{cut}",
        2.0 * p.M * (p.K * p.N + N * p.r),
        moved(shares, p),
        choices={"fused": 1, "columns": shares.tile.columns, "splits": shares.splits},
        seconds=seconds(shares, p, device) + LAUNCH_SECONDS,
    )


def why_refused(p: Problem, device: Device) -> str | None:
    """Why the kernel can't serve a ``linear_expand``, a sentence, or None."""
    has = ".".join(map(str, divmod(device.capability, 10)))
    if device.capability < _OLDEST:
        return f"{_GEMM.name} needs compute capability 8.0, this is {has}"
    if device.capability in _WGMMA:
        return f"{_GEMM.name} multiplies by mma.sync, too slow for compute capability {has}"
    reason = gemm.why_refused(p, _GEMM)
    if reason is None and p.dtype is torch.float32 and not p.tf32:
        return (
            f"{'dy' if p.transposed else 'x'} is in float32, which {_GEMM.name} rounds to TF32, and "
            "PyTorch may not: torch.backends.cuda.matmul.allow_tf32 is False"
        )
    return reason


def shares_of(p: Problem, device: Device, fixed: Choices = NONE) -> Shares:
    """Of the tiles and shares that there are, those that end first: of those with the choices, if there
    are any."""
    possible = list(_possible(p, device, fixed)) or list(_possible(p, device, NONE))
    return min(possible, key=lambda shares: seconds(shares, p, device))


def _possible(p: Problem, device: Device, fixed: Choices) -> Iterator[Shares]:
    N, depth = sizes_of(p)
    for tile in row_of(LINEAR_EXPAND, device.capability):
        if fixed.get("columns", tile.columns) != tile.columns:
            continue
        if p.dtype is torch.float32 and tile.columns != _SINGLE:
            continue
        down, across = -(-p.M // ROWS), -(-N // tile.columns)
        few = down * across < _FEW * device.sms or "splits" in fixed
        most = max(1, min(_MOST_SPLITS, depth // _LEAST_DEPTH)) if few else 1
        for splits in range(1, most + 1):
            if fixed.get("splits", splits) != splits:
                continue
            yield Shares(tile, down, across, splits)


def seconds(shares: Shares, p: Problem, device: Device) -> float:
    """What the SM with the most tiles takes, or memory, whichever is longer."""
    tile, ctas = shares.tile, shares.tiles * shares.splits
    elements = ROWS * tile.columns
    rate = tile.rate * device.rate(p.dtype, p.tf32) / device.sms
    main = 2.0 * elements * -(-sizes_of(p)[1] // shares.splits) / rate
    around = (_AROUND + _MASK * elements * p.dropout) / tile.resident
    part = 4 * elements / _PARTS if shares.splits > 1 else 0.0
    busy = -(-ctas // device.sms) * (main + around + part) + shares.splits * part
    return max(busy, moved(shares, p) / device.bandwidth)


def moved(shares: Shares, p: Problem) -> float:
    """Bytes to and from memory: operands and the result once, parts twice."""
    large = (p.M * p.K + p.N * p.K + p.M * p.N) * p.dtype.itemsize
    factors = p.M * wide(p.dtype).itemsize + sizes_of(p)[0] * p.adapter_dtype.itemsize
    return float(large + factors * p.r + 8 * shares.partials)


def _run(p: Problem, N: int, shares: Shares) -> Any:
    M, dtype, masked, transposed = p.M, p.dtype, p.dropout, p.transposed
    tiles, columns, splits, parts = (
        shares.tiles,
        shares.tile.columns,
        shares.splits,
        shares.partials,
    )

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
        mask = mask_of(masked, dropout_p, seed)
        torch.ops.lorafast_cuda.linear_expand.default(
            x, weight.t() if transposed else weight, s, lora_B, float(scaling), bias, *mask, y,
            partials, used, columns, splits,
        )  # fmt: skip
        return y

    return run
