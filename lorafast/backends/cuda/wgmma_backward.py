"""``lora_linear_backward`` on Hopper in one launch (csrc/cuda/sm90_gradients.cuh): ``dx = dy·W + ds·A``
as the GEMM of ``linear_expand``; before its tiles helpers make ``ds`` and ``dB`` in one pass over dy,
after them all CTAs make ``dA``.

Whether ``dA`` is part of it or a launch of ``shrink_backward`` after it is a choice: ``rows_behind`` is
0 then. In the launch its items fill the last round of tiles, and cost nothing where that is far from
full. What is left of them reads x at the whole chip's rate.

Parts of sums are scratch memory in float32. ``ds`` [M, ranks] has one for each range of 32,768 / ranks
columns, whose sums fit into registers. ``dB`` [N, ranks] and ``dA`` have one for each group of row
blocks: short groups raise flags early and fill gaps well, long ones leave fewer parts. Written and
read, parts of dB have ranks / (32 · rows_ahead) of dy's bytes: 1/8 for 16 ranks and 4 row blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafast.backends.cost import LAUNCH_SECONDS, Device
from lorafast.backends.cuda import wgmma
from lorafast.backends.cuda.gemm import ALIGNED
from lorafast.backends.cuda.launch import NONE, Choices, Launch
from lorafast.backends.cuda.skinny import plan_shrink_backward
from lorafast.backends.cuda.tables import ROWS, WGMMA
from lorafast.backends.plan import Run
from lorafast.core.problem import Layout, Problem
from lorafast.kernels.common.counters import counters

_COLUMNS = 256
"""Of a tile of dx."""
_STEP = 128
"""Columns of a step of a sum over rows."""
_RANKS = (16, 32, 64)
_MOST_ROWS = 2**16 - 1
_WARPS = 8
_HELPERS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
_ROWS_AHEAD = (1, 2, 4, 8)
_ROWS_BEHIND = (0, 1, 2, 4, 8)
_REACHED = 0.9
"""Of the rate of PyTorch's large GEMMs and of the bandwidth. Assumed, as in wgmma.py."""
_SKINNY = 0.7
"""Of the bandwidth, by a launch of ``shrink_backward``: as cost.py has it."""
_AROUND = 3000.0
"""Clocks before the first tile and after the last one."""
_END = 4000.0
"""Clocks of an item from its last step to its end, and of adding up parts."""
_FLOPS = 4096
"""Of an SM in a clock, at the most."""
_CLOCK = 1.7e9
"""Of the SMs, in Hz: assumed."""
_A_FACTOR = 16.0
"""Clocks of a product of 16 rows or columns and up to 32 ranks: shared memory gives its large factor, 2
KB, in as many. Of 64 ranks it takes tensor cores twice that."""
_GATHERED = 600.0
"""Clocks of 16 bytes of B that are gathered from elements, by each of 96 threads: a trip to L2."""


def plan_lora_linear_backward(
    problem: Problem, device: Device, fixed: Choices = NONE
) -> Launch | str:
    """One launch for ``dx`` and, where they are wanted, ``dB`` and ``dA``; or ``dA`` in a second one; or
    why there is none: a sentence.

    ``run(dy, x, weight, lora_A, lora_B, s, scaling, dropout_p, seed)`` returns
    ``dx, None, dA, dB, None``.
    """
    p = problem
    reason = why_not_in_one(p, device)
    if reason is not None:
        return reason
    cut = best_cut(p, device, fixed)
    group = wgmma.group_of(fixed, device)
    after: Launch | None = None
    if "dA" in p.wants and cut.rows_behind == 0:
        answer = plan_shrink_backward(_of_dA(p), device)
        if isinstance(answer, str):
            return answer
        after = answer
    tiles = _blocks(p.M, ROWS) * _blocks(p.K, _COLUMNS)
    ctas = min(device.sms // cut.cluster * cut.cluster, tiles + cut.helpers)
    pairs = " in clusters of 2" if cut.cluster == 2 else ""
    ahead = "ds and dB" if "dB" in p.wants else "ds"
    behind = ", then dA" if "dA" in p.wants and after is None else ""
    line = (
        f"lora_linear_backward: {ctas} CTAs{pairs} for {tiles} tiles of {ROWS} x "
        f"{_COLUMNS}, wgmma, {cut.helpers} of them make {ahead} first{behind}"
    )
    moved = _moved(p, cut)
    busy = cut.clocks * _FLOPS * device.sms / (device.flops * _REACHED)
    seconds = max(busy, moved / (device.bandwidth * _REACHED)) + LAUNCH_SECONDS
    flops = 2.0 * p.M * p.K * (p.N + p.r) + 2.0 * p.M * p.N * p.r * (1 + ("dB" in p.wants))
    if behind:
        flops += 2.0 * p.M * p.K * p.r
    if after is not None:
        line += f"; {after.line}"
        moved, flops = moved + after.moved, flops + after.flops
        seconds += _apart(p, device)
    choices = {
        "helpers": cut.helpers, "rows_ahead": cut.rows_ahead, "group": group, "cluster": cut.cluster
    }  # fmt: skip
    if "dA" in p.wants:
        choices["rows_behind"] = cut.rows_behind
    return Launch(
        _run(p, cut, group, device.sms, None if after is None else after.run),
        line, flops, moved,
        launches=1 if after is None else 2,
        choices=choices,
        seconds=seconds,
    )  # fmt: skip


def why_not_in_one(p: Problem, device: Device) -> str | None:
    """Why a layer's backward can't be one launch, a sentence, or None. How long it takes is another
    question."""
    if "dx" not in p.wants:
        return "dx isn't wanted, without it there is no GEMM beside which sums are made"
    for name in ("dweight", "dbias"):
        if name in p.wants:
            return f"{name} is wanted, a backward by wgmma has dx, dA and dB"
    if p.dropout:
        return "there is dropout, and beside helpers neither dx's term nor the x of dA is masked"
    if p.dtype is not torch.bfloat16:
        return f"dy is {p.dtype}, helpers make ds and dB of bfloat16"
    if p.r > _RANKS[-1]:
        return f"the rank is {p.r}, helpers make ds and dB of 1 to {_RANKS[-1]}"
    if p.M == 0 or p.N == 0:
        return f"dy is {p.M} x {p.N}, there is nothing to compute"
    if p.K == 0:
        return f"dx is {p.M} x {p.K}, there is nothing to compute"
    if "dA" in p.wants and (p.layouts.x.rows < ALIGNED or p.layouts.x.huge):
        return f"the rows of x aren't aligned to {ALIGNED} bytes, or can't be described to TMA"
    if p.layouts.weight.rows < ALIGNED:
        return "the weight's rows aren't contiguous, a backward by wgmma reads it along them"
    return wgmma.why_refused(p._replace(transposed=True), device)


@dataclass(frozen=True)
class Cut:
    """So many helpers, and row blocks of a part of dB and of dA; ``rows_behind`` is 0 where dA is a
    launch of its own. ``cluster``: CTAs of one, of which each has row blocks of its own. ``clocks``: of
    the launch."""

    helpers: int
    rows_ahead: int
    rows_behind: int
    cluster: int = 1
    clocks: float = 0.0


def best_cut(p: Problem, device: Device, fixed: Choices = NONE) -> Cut:
    """The one with which a backward ends first by the model, all its launches."""
    most = max(min(device.sms // 2, _ahead(p, 1)), 1)
    helpers: tuple[int, ...] = tuple(n for n in _HELPERS if n <= most)
    if 1 <= fixed.get("helpers", 0) <= device.sms:
        helpers = (fixed["helpers"],)
    ahead: tuple[int, ...] = _ROWS_AHEAD
    behind: tuple[int, ...] = _ROWS_BEHIND if "dA" in p.wants else (0,)
    if 1 <= fixed.get("rows_ahead", 0) <= _MOST_ROWS:
        ahead = (fixed["rows_ahead"],)
    if "dA" in p.wants and 0 <= fixed.get("rows_behind", -1) <= _MOST_ROWS:
        behind = (fixed["rows_behind"],)
    clusters = tuple(n for n in sorted(WGMMA[device.capability].clusters) if n <= device.sms)
    if fixed.get("cluster") in clusters:
        clusters = (fixed["cluster"],)
    apart = _apart(p, device) * _CLOCK if "dA" in p.wants else 0.0
    found = [
        Cut(n, of_ahead, of_behind, cluster, clocks)
        for cluster in clusters
        for n in helpers
        if n % cluster == 0
        for of_ahead in ahead
        for of_behind, clocks in _clocks(p, device, n, of_ahead, behind, cluster)
    ]
    if not found:  # one helper in a cluster of two makes the other one
        fixed = {**fixed, "helpers": helpers[0] + 1, "cluster": clusters[0]}
        return best_cut(p, device, fixed)
    return min(found, key=lambda cut: cut.clocks + (0.0 if cut.rows_behind else apart))


def _clocks(
    p: Problem,
    device: Device,
    helpers: int,
    rows_ahead: int,
    behind: tuple[int, ...],
    cluster: int,
) -> Iterator[tuple[int, float]]:
    """Of the launch, by each number of row blocks that a part of dA may have.

    Tiles end round by round, those of helpers later by their items. A tile waits for its row block's
    flag before its last step: the first ones, where helpers are slow to start, and the last ones, where
    they are slower than the tiles.
    """
    table, ranks = WGMMA[device.capability], ranks_of(p.r)
    down, across = _blocks(p.M, ROWS * cluster) * cluster, _blocks(p.K, _COLUMNS)
    fixed = {"columns": _COLUMNS, "cluster": cluster}
    step = wgmma.tile_of(p.M, p.K, device, fixed).step
    tile = (_blocks(p.N, table.depth) + _blocks(p.r, table.depth)) * step
    memory = device.bandwidth / _CLOCK  # bytes in a clock
    ahead = _item(p, device, ranks, rows_ahead, min(table.helper_bytes, memory / helpers))
    late = _blocks(_ahead(p, rows_ahead), helpers) * ahead
    others = device.sms // cluster * cluster - helpers
    group = table.group * cluster
    first = min(down, group * _blocks(others, group * across))
    wait = _blocks(_ahead(p, rows_ahead) * first // down, helpers) * ahead - tile
    ends = [(others, 0.0), (helpers, late)]
    left, end = down * across, 0.0
    while left > 0:  # the class that is free first takes a tile each
        (count, free), other = sorted(ends, key=lambda of: of[1])
        taken = min(count, left)
        left, end = left - taken, max(end, free + tile)
        if taken < count:
            break
        ends = [(count, free + tile), other]
    end = max(end + max(wait, 0.0), late + tile) + _AROUND + _END
    for of_group in behind:
        if of_group == 0 or "dA" not in p.wants:
            yield 0, end
            continue
        items = _blocks(down, of_group) * _blocks(_blocks(p.K, _STEP), 256 // ranks)
        read = 2.0 * p.M * p.K + 8.0 * _blocks(down, of_group) * p.K * ranks
        beside = read / items / table.helper_bytes + _END
        done = sum(count * int(max(end - free, 0.0) / beside) for count, free in ends)
        rest = max(items - done, 0)
        alone = (
            read / items / min(table.helper_bytes, memory / min(max(rest, 1), device.sms)) + _END
        )
        yield of_group, end + _blocks(rest, device.sms) * alone + _END


def _item(p: Problem, device: Device, ranks: int, rows: int, rate: float) -> float:
    """Clocks of an item of ds and dB: it reads, it multiplies, and it gathers B where that isn't vectors
    of bfloat16."""
    steps = min(_blocks(p.N, _STEP), 256 // ranks)
    products = (1 + ("dB" in p.wants)) * 16 * _A_FACTOR * (2 if ranks == 64 else 1)
    read = 2.0 * ROWS * _STEP / rate
    vectors = (
        p.adapter_dtype is torch.bfloat16 and p.r % 8 == 0 and p.layouts.lora_B.rows >= ALIGNED
    )
    gathered = 0.0 if vectors else _blocks(_STEP * ranks // 8, 96) * _GATHERED
    parts = 8.0 * (ROWS * ranks * (_blocks(p.N, _STEP) > steps) + steps * _STEP * ranks / rows)
    return rows * (steps * max(products, read, gathered) + parts / rate) + _END


def _ahead(p: Problem, rows: int) -> int:
    """Items of helpers."""
    steps = _blocks(p.N, _STEP)
    return _blocks(_blocks(p.M, ROWS), rows) * _blocks(steps, 256 // ranks_of(p.r))


def _of_dA(p: Problem) -> Problem:
    """As an operation, of the ds that the launch leaves: rows of 32 bytes and more."""
    layouts = p.layouts._replace(s=Layout())
    return p._replace(operation="shrink_backward", N=0, wants=(), layouts=layouts)


def _apart(p: Problem, device: Device) -> float:
    """Seconds of a launch of dA."""
    return 2.0 * p.M * p.K / (device.bandwidth * _SKINNY) + LAUNCH_SECONDS


def ranks_of(r: int) -> int:
    """Those of an instance of the kernel, and of ds."""
    return next(ranks for ranks in _RANKS if r <= ranks)


def parts_of(p: Problem, cut: Cut) -> tuple[int, int, int]:
    """float32 of the parts of ds, of dB and of dA."""
    ranks, down = ranks_of(p.r), _blocks(p.M, ROWS)
    along, across = _blocks(p.N, _STEP), _blocks(p.K, _STEP)
    ranges, block = _blocks(along, 256 // ranks), _STEP * ranks
    of_ds = ranges * down * block if ranges > 1 else 0
    of_dB = _blocks(down, cut.rows_ahead) * along * block if "dB" in p.wants else 0
    in_one = "dA" in p.wants and cut.rows_behind > 0
    return of_ds, of_dB, _blocks(down, cut.rows_behind) * across * block if in_one else 0


def counters_of(p: Problem) -> int:
    """Of a row block: its flag, and the parts of ds of each warp; of a range of columns: parts that are
    stored; the queue behind tiles."""
    steps = 256 // ranks_of(p.r)
    ranges = sum(_blocks(_blocks(n, _STEP), steps) for n in (p.N, p.K))
    return wgmma.COUNTERS + (1 + _WARPS) * _blocks(p.M, ROWS) + ranges + 1


def _moved(p: Problem, cut: Cut) -> float:
    """Bytes of the launch: dy twice, parts written and read."""
    size, adapters = p.dtype.itemsize, p.adapter_dtype.itemsize
    moved = float(2 * p.M * p.N + p.N * p.K + p.M * p.K) * size
    moved += 2.0 * p.M * ranks_of(p.r) * size + p.r * (p.N + p.K) * adapters
    if "dB" in p.wants:
        moved += float(p.M * p.r * size + p.N * p.r * adapters)
    if "dA" in p.wants and cut.rows_behind:
        moved += float(p.M * (p.K + ranks_of(p.r)) * size + p.r * p.K * adapters)
    return moved + 8.0 * sum(parts_of(p, cut))


def _run(p: Problem, cut: Cut, group: int, ctas: int, after: Run | None) -> Run:
    M, N, K, r = p.M, p.N, p.K, p.r
    ranks, adapters = ranks_of(r), p.adapter_dtype
    want_dB, want_dA = "dB" in p.wants, "dA" in p.wants and after is None
    parts, used = sum(parts_of(p, cut)), counters_of(p)
    helpers = min(cut.helpers, ctas)
    numbers = group, ctas, helpers, cut.rows_ahead, max(cut.rows_behind, 1), cut.cluster

    def run(
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        s: Tensor | None,
        scaling: float,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, None, Tensor | None, Tensor | None, None]:
        dtype, device = dy.dtype, dy.device
        dx = torch.empty((M, K), dtype=dtype, device=device)
        ds = torch.empty((M, ranks), dtype=dtype, device=device)
        dA = torch.empty((r, K), dtype=adapters, device=device) if want_dA else None
        dB = torch.empty((N, r), dtype=adapters, device=device) if want_dB else None
        partials = torch.empty(parts, dtype=torch.float32, device=device) if parts else None
        torch.ops.lorafast_cuda.lora_linear_backward_sm90.default(
            dy, x if want_dA else None, weight, lora_A, lora_B, s if want_dB else None, float(scaling),
            dx, ds, dA, dB, partials, counters(dy, used), *numbers,
        )  # fmt: skip
        if after is not None:
            dA = after(ds[:, :r], x, 0.0, None)
        return dx, None, dA, dB, None

    return run


def _blocks(n: int, of: int) -> int:
    return -(-n // of)
