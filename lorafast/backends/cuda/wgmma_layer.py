"""``lora_linear`` on Hopper in one launch: the first CTAs make ``s`` before they take tiles of ``y``.

The GEMM is that of ``wgmma``; csrc/cuda/sm90_shrink.cuh has what these helpers do.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafast.backends.cost import LAUNCH_SECONDS, Device
from lorafast.backends.cuda import wgmma
from lorafast.backends.cuda.launch import NONE, Choices, Launch, mask_of
from lorafast.backends.cuda.tables import ROWS, WGMMA
from lorafast.backends.cuda.wgmma import among
from lorafast.backends.plan import Run
from lorafast.core.problem import Problem
from lorafast.kernels.common.counters import counters

_CLOCK = 1.7e9
"""Of the SMs, in Hz: assumed."""
_ASKED = 48
"""Rows of A in a K block that are asked for before the first is there."""
_LATENCY = 450.0
"""Clocks from there to the stage: of L2, and of handing over. Assumed, not measured."""
_LONGER = 1.9
"""Times what is modelled: 203 µs for 106, measured on an H200 (M = 2048, K = N = 4096, r = 16, eight
CTAs shrink first). Why is not known; the operations one by one are taken meanwhile."""
_MASK = 720.0
"""Clocks in which a helper drops elements of a K block: 360 instructions of machine code a warp, and two
warps share a scheduler, which issues one a clock."""


def plan_lora_linear(problem: Problem, device: Device, fixed: Choices = NONE) -> Launch | str:
    """The launch of ``y`` and ``s``, or why there is none: a sentence. ``run`` is as ``Plan`` says."""
    p = problem
    reason = why_not_in_one(p, device)
    if reason is not None:
        return reason
    plan = helped(p, device, fixed)
    group = wgmma.group_of(fixed, device)
    apart = clocks_apart(p.M, p.K, p.N, device)
    if plan.clocks >= apart and not fixed:
        return (
            f"helpers don't pay: modelled, one launch takes {plan.clocks:,.0f} clocks, one more for s "
            f"{apart:,.0f}"
        )
    tiles = -(-p.M // ROWS) * -(-p.N // plan.columns)
    ctas = device.sms // plan.cluster * plan.cluster
    sets = -(-p.M // (ROWS * plan.cluster)) * -(-p.N // plan.columns)
    started = min(plan.cluster * sets + plan.helpers, ctas)
    pairs = " in clusters of 2" if plan.cluster == 2 else ""
    size, adapter = p.dtype.itemsize, p.adapter_dtype.itemsize
    moved = float(
        (p.M * p.K + p.N * p.K + p.M * p.N + p.M * p.r) * size + (p.N + p.K) * p.r * adapter
    )
    clocks = plan.clocks + _clocks_of(p.r, plan.columns, plan.cluster, device)
    return Launch(
        _run(p, plan, group, ctas),
        f"lora_linear: {started} CTAs{pairs} for {tiles} tiles of {ROWS} x {plan.columns}, wgmma, "
        f"{plan.helpers} of them shrink first",
        2.0 * p.M * (p.N * (p.K + p.r) + p.K * p.r),
        moved,
        choices={
            "helpers": plan.helpers, "columns": plan.columns, "group": group, "cluster": plan.cluster,
        },
        # The mask falls on x, not on tiles.
        seconds=_LONGER * wgmma.seconds_of(p._replace(dropout=False), clocks, moved, device),
    )  # fmt: skip


def why_not_in_one(p: Problem, device: Device) -> str | None:
    """Why a layer's forward can't be one launch, a sentence, or None. How long it takes is another
    question."""
    reason = wgmma.why_refused(p, device)
    if reason is not None:
        return reason
    if p.dtype is not torch.bfloat16:
        return f"x is {p.dtype}, whose s is float32: helpers make one of bfloat16"
    widest = max(WGMMA[device.capability].columns())
    if p.r > widest:
        return f"the rank is {p.r}, helpers make s of 1 to {widest}"
    if p.M == 0 or p.N == 0:
        return f"y is {p.M} x {p.N}, there is nothing to compute"
    return None


@dataclass(frozen=True)
class Helped:
    """So many helpers beside tiles of so many columns, in clusters of so many CTAs, and the clocks of
    the launch."""

    helpers: int
    columns: int
    cluster: int
    clocks: float


def helped(p: Problem, device: Device, fixed: Choices = NONE) -> Helped:
    """The helpers with which a layer ends first, by a model of the queues. What ``fixed`` says holds
    where it can be."""
    table = WGMMA[device.capability]
    wide = tuple(n for n in table.columns() if n >= p.r)  # A lies where a tile of W does
    clusters = tuple(cluster for cluster in table.clusters if cluster <= device.sms)
    found = [
        (helpers, columns, cluster)
        for columns in among(wide, fixed.get("columns"))
        for cluster in among(clusters, fixed.get("cluster"))
        for helpers in range(cluster, _most_helpers(p.M, cluster, device) + 1, cluster)
    ]
    given = [plan for plan in found if plan[0] == fixed.get("helpers")]
    plans = (Helped(*plan, _clocks_helped(p, *plan, device)) for plan in given or found)
    return min(plans, key=lambda plan: (plan.clocks, plan.helpers))


def _most_helpers(M: int, cluster: int, device: Device) -> int:
    """CTAs: a row block each, and no more than half of the chip where it has two clusters."""
    return min(-(-M // (ROWS * cluster)), max(device.sms // (2 * cluster), 1)) * cluster


def clocks_apart(M: int, K: int, N: int, device: Device) -> float:
    """Of ``shrink``, bound by reading x, and then ``linear_expand``."""
    shrink = 2.0 * M * K / device.bandwidth + LAUNCH_SECONDS
    return wgmma.tile_of(M, N, device).clocks(K) + shrink * _CLOCK


def clocks_of_item(p: Problem, helpers: int, device: Device) -> float:
    """Of a row block of s: the slowest of reading x from memory, of x and A through L2, of writing A
    beside x, of the mask."""
    table, memory = WGMMA[device.capability], device.bandwidth / _CLOCK / helpers
    x, a = 2.0 * ROWS * table.depth, float(p.r * table.depth * p.adapter_dtype.itemsize)
    read = max(x / memory, (x + a) / table.helper_bytes)
    batches = -(-p.r // _ASKED)
    return -(-p.K // table.depth) * max(read, batches * _LATENCY, _MASK * p.dropout)


def _clocks_helped(p: Problem, helpers: int, columns: int, cluster: int, device: Device) -> float:
    """Tiles end round by round, those of helpers later by their row blocks of s; the first tiles may
    have to wait for theirs. All of it goes by clusters."""
    rows, across = -(-p.M // (ROWS * cluster)), -(-p.N // columns)
    tile = _clocks_of(p.K, columns, cluster, device)
    item = clocks_of_item(p, helpers, device)
    help_, others = helpers // cluster, (device.sms - helpers) // cluster
    late = -(-rows // help_) * item
    group = max(1, WGMMA[device.capability].group // cluster)
    first = min(rows, group * -(-others // (group * across)))
    wait = max(0.0, -(-first // help_) * item - tile)
    return max(_end(rows * across, others, help_, tile, late) + wait, late)


def _clocks_of(K: int, columns: int, cluster: int, device: Device) -> float:
    """Of a tile, while all SMs have one."""
    return -(-K // WGMMA[device.capability].depth) * wgmma.step_of(
        columns, cluster, device.sms, device
    )


def _end(tiles: int, others: int, helpers: int, tile: float, late: float) -> float:
    """When so many tiles are done: by the others a round every ``tile``, by helpers one later by
    ``late``."""
    alone = -int(-late // tile)  # rounds of the others before one of the helpers
    if tiles <= alone * others:
        return -(-tiles // others) * tile
    rounds = -(-(tiles + helpers * alone) // (others + helpers))
    before = (rounds - 1) * others + (rounds - alone) * helpers
    return late + (rounds - alone) * tile if before >= tiles else rounds * tile


def _run(p: Problem, plan: Helped, group: int, ctas: int) -> Run:
    M, N, r, masked = p.M, p.N, p.r, p.dropout
    numbers = plan.columns, group, ctas, plan.helpers, plan.cluster
    used = wgmma.COUNTERS + -(-M // ROWS)

    def run(
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        bias: Tensor | None = None,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        y = torch.empty((M, N), dtype=x.dtype, device=x.device)
        s = torch.empty((M, r), dtype=x.dtype, device=x.device)
        mask = mask_of(masked, dropout_p, seed)
        torch.ops.lorafast_cuda.lora_linear_sm90.default(
            x,
            weight,
            lora_A,
            lora_B,
            float(scaling),
            bias,
            *mask,
            y,
            s,
            counters(x, used),
            *numbers,
        )
        return y, s

    return run
