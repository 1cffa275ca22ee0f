"""``linear_expand`` on Hopper: one accumulator for both terms (csrc/cuda/sm90.cuh).

A persistent kernel whose warps load by TMA, multiply by ``wgmma`` or write the low-rank factors. Tiles
come from a queue. Two CTAs of a cluster have tiles below each other and share what they load of W. What
TMA can't read is refused. ``wgmma_layer`` has ``lora_linear``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafast.backends.cost import LAUNCH_SECONDS, Device
from lorafast.backends.cuda import gemm, native
from lorafast.backends.cuda.gemm import ALIGNED, Gemm, sizes_of
from lorafast.backends.cuda.launch import NONE, Choices, Launch, mask_of
from lorafast.backends.cuda.tables import ROWS, WGMMA
from lorafast.backends.plan import Run
from lorafast.core.dtypes import wide
from lorafast.core.problem import Layout, Problem
from lorafast.kernels.common.counters import counters

_GEMM = Gemm(
    "the GEMM by wgmma", (torch.bfloat16, torch.float16), (1, 2**31 - 1), ROWS,
    min(min(row.columns()) for row in WGMMA.values()),
)  # fmt: skip
_MOST_GROUP = 2**16 - 1
_REACHED = 0.9
"""Of the rate of PyTorch's large GEMMs, while tiles are multiplied. Assumed, not measured."""
_MASKED, _BITS = 1.01, 9200.0
"""Times the clocks of tiles under a mask, by what is counted of one (K = 4096); and clocks in which
idle warps make the mask of 256 columns, which a short tile waits for."""
_AROUND = 3000.0
"""Clocks before the first tile and after the last, assumed: memory's latency, and y's way there."""
_FLOPS = 4096
"""Of an SM in a clock, at the most."""
COUNTERS = 4
"""Of every launch; those of row blocks follow."""


def plan_linear_expand(problem: Problem, device: Device, fixed: Choices = NONE) -> Launch | str:
    """The launch of ``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias``, transposed of ``x·W + …``, or why there
    is none: a sentence. ``run`` takes what ``Plan`` says."""
    p = problem
    reason = why_refused(p, device)
    if reason is not None:
        return reason
    N, K = sizes_of(p)
    tile = tile_of(p.M, N, device, fixed)
    columns, cluster, ctas = tile.columns, tile.cluster, tile.ctas
    group = group_of(fixed, device)
    tiles = -(-p.M // ROWS) * -(-N // columns)
    clocks = tile.clocks(K + p.r)
    if p.dropout:
        clocks = max(clocks, tile.rounds * _BITS * columns / 256)
    pairs = " in clusters of 2" if cluster == 2 else ""
    size = p.dtype.itemsize
    moved = float(
        (p.M * K + N * K + p.M * N) * size
        + p.M * p.r * wide(p.dtype).itemsize
        + N * p.r * p.adapter_dtype.itemsize
    )
    return Launch(
        _run(p, N, columns, group, ctas, cluster),
        f"linear_expand: {ctas} CTAs{pairs} for {tiles} tiles of {ROWS} x {columns}, wgmma",
        2.0 * p.M * N * (K + p.r),
        moved,
        choices={"fused": 1, "columns": columns, "group": group, "cluster": cluster},
        seconds=seconds_of(p, clocks, moved, device),
    )


def group_of(fixed: Choices, device: Device) -> int:
    """Row blocks whose tiles run together."""
    return max(1, min(fixed.get("group", WGMMA[device.capability].group), _MOST_GROUP))


def seconds_of(p: Problem, clocks: float, moved: float, device: Device) -> float:
    """Of so many clocks in which tensor cores have all they can do, or of the bytes, with the launch.

    What a mask keeps is added when all products are made: nothing hides that."""
    busy = clocks * (_MASKED if p.dropout else 1.0) + _AROUND
    of_clocks = busy * _FLOPS * device.sms / (device.flops * _REACHED)
    return max(of_clocks, moved / (device.bandwidth * _REACHED)) + LAUNCH_SECONDS


def step_of(columns: int, cluster: int, ctas: int, device: Device) -> float:
    """Clocks of a K block: of tensor cores, or until L2 has brought it."""
    table = WGMMA[device.capability]
    loaded = table.depth * 2 * (ROWS + columns // cluster)
    return max(
        table.tile(columns).clocks, loaded / min(table.l2_port, table.l2 * device.sms / ctas)
    )


def why_refused(p: Problem, device: Device) -> str | None:
    """A sentence if the kernel can't serve a ``linear_expand``, else None."""
    if device.capability not in WGMMA:
        has = ".".join(map(str, divmod(device.capability, 10)))
        return f"compute capability is {has}, the kernels of wgmma are for 9.0"
    if not native.has_wgmma():
        return "the native CUDA kernels were built without code for 90a, which wgmma needs"
    reason = gemm.why_refused(p, _GEMM)
    if reason is not None:
        return reason
    N, _ = sizes_of(p)
    x, weight = p.layouts.dy if p.transposed else p.layouts.x, p.layouts.weight
    written = Layout.fresh(p.M, N, p.dtype)
    if written.rows < ALIGNED and p.M > 1:
        return f"a row of y has {N * p.dtype.itemsize} bytes, TMA writes multiples of {ALIGNED}"
    if x.huge or weight.huge or written.huge:
        return "a matrix has no rows, too many, too long ones for TMA, or some that overlap"
    return None


@dataclass(frozen=True)
class Tile:
    """Tiles of 128 rows and so many columns, on so many CTAs, of which ``cluster`` are one: tiles below
    each other. ``rounds``: tiles of a CTA, of which a K block of ``depth`` takes ``step`` clocks."""

    columns: int
    cluster: int
    ctas: int
    rounds: int
    depth: int
    step: float

    def clocks(self, K: int) -> float:
        """Of all."""
        return self.rounds * -(-K // self.depth) * self.step


def tile_of(M: int, N: int, device: Device, fixed: Choices = NONE) -> Tile:
    """The one that ends first: wide tiles and clusters of two load less, others can fill the chip
    better. What ``fixed`` says of it holds where it can be."""
    table, found = WGMMA[device.capability], []
    for columns in among(table.columns(), fixed.get("columns")):
        for cluster in among(table.clusters, fixed.get("cluster")):
            if cluster > device.sms:
                continue
            tiles = -(-M // (ROWS * cluster)) * -(-N // columns)
            clusters = max(1, min(tiles, device.sms // cluster))
            ctas, rounds = cluster * clusters, -(-tiles // clusters)
            step = step_of(columns, cluster, ctas, device)
            found.append(Tile(columns, cluster, ctas, rounds, table.depth, step))
    return min(found, key=lambda tile: (tile.rounds * tile.step, tile.ctas))


def among(known: tuple[int, ...], fixed: int | None) -> tuple[int, ...]:
    """What was chosen, if there is such a one, else all."""
    return known if fixed is None or fixed not in known else (fixed,)


def _run(p: Problem, N: int, columns: int, group: int, ctas: int, cluster: int) -> Run:
    M, masked, transposed = p.M, p.dropout, p.transposed

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
        y = torch.empty((M, N), dtype=x.dtype, device=x.device)
        mask = mask_of(masked, dropout_p, seed)
        torch.ops.lorafast_cuda.linear_expand_sm90.default(
            x, weight.t() if transposed else weight, s, lora_B, float(scaling), bias, *mask, y,
            counters(x, COUNTERS), columns, group, ctas, cluster,
        )  # fmt: skip
        return y

    return run
