"""What is bound by launches or writes: ``expand``, and a small layer's forward in one launch.

Sizes are decided here; ``run`` only launches. Kernels: csrc/cuda/expand.cu, csrc/cuda/lora_linear.cu.
"""

from typing import Any

import torch
from torch import Tensor

from lorafast.backends.cost import LAUNCH_SECONDS, Device, Estimate, base_gemm, work
from lorafast.backends.cuda.launch import CALL_HOST, NONE, Choices, Launch
from lorafast.backends.cuda.tables import SMALL, Small, row_of
from lorafast.core.dtypes import wide
from lorafast.core.problem import DENSE, Problem
from lorafast.reference.dropout import survivor_scale, threshold

_OLDEST = 80
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_SPAN = 32
"""Columns of a warp."""
_WARPS = 8
"""Of a CTA of ``expand``; each has 32 rows."""
_MOST_SHARED = 64 * 1024
"""Bytes of B that ``expand`` keeps in shared memory."""
_MOST_GROUPS = 65535
"""In the second dimension of a grid."""

_ROWS, _COLUMNS = 64, (64, 32)
"""Of a tile of ``lora_linear``."""
_MOST_RANKS = 64
_MOST_K = 2**28
_BLOCK = 128
"""Bytes of a row of x in a stage."""

_CLOCK = 1.7e9
_ENDS = 3000
"""Clocks of a tile before its first and after its last K block: latencies of memory, B, y."""
_LEAST = 500
"""Clocks of a K block, however little is in it: a barrier, and loads and products that wait for each
other. Assumed, not measured."""
_BY_ELEMENT = 8
"""Times as many instructions in a K block of rows that aren't aligned."""


def plan_expand(problem: Problem, device: Device, fixed: Choices = NONE) -> Launch | str:
    """The launch of ``y = drop(scaling · s·Bᵀ)``, or why there is none.

    Its ``run`` takes ``bias`` as a sixth argument, which is added before y is rounded.
    """
    p, table = problem, _table(device)
    if device.capability < _OLDEST:
        return f"expand needs compute capability 8.0, this is {_said(device)}"
    if p.dtype not in _DTYPES:
        return f"y has dtype {p.dtype}, expand writes float16, bfloat16 or float32"
    if p.r < 1:
        return f"r is {p.r}, expand takes 1 or more"
    half = p.dtype is torch.bfloat16
    slices = -(-p.r // (16 if half else 8))
    fitting = [
        w for w in (4, 2, 1) if w <= table.column_warps and w * slices <= _MOST_SHARED // 1024
    ]
    if not fitting:
        return f"r is {p.r}, expand keeps up to {64 * (16 if half else 8)} ranks in shared memory"
    warps = next((w for w in fitting[::-1] if w * _SPAN >= p.N), fitting[0])
    warps = next((w for w in fitting if w == fixed.get("column_warps")), warps)
    rows = _WARPS // warps * 32
    across, steps = -(-p.N // (warps * _SPAN)), -(-p.M // rows)
    resident = table.resident if half else table.resident_tf32
    groups = max(1, min(steps, device.sms * resident // max(across, 1)))
    least = max(1, -(-steps // _MOST_GROUPS))
    row_blocks = max(least, min(fixed.get("row_blocks", -(-steps // groups)), steps))
    grid = across, -(-steps // row_blocks)
    moved = p.M * p.N * p.dtype.itemsize + p.M * p.r * wide(p.dtype).itemsize
    return Launch(
        _run_expand(p, warps, row_blocks),
        f"expand: {grid[0]} x {grid[1]} CTAs, {rows} x {warps * _SPAN}",
        2.0 * p.M * p.N * p.r,
        float(moved + p.N * p.r * p.adapter_dtype.itemsize),
        choices={"column_warps": warps, "row_blocks": row_blocks},
    )


def _run_expand(p: Problem, warps: int, row_blocks: int) -> Any:
    M, N, dtype, masked = p.M, p.N, p.dtype, p.dropout

    def run(
        s: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        y = torch.empty((M, N), dtype=dtype, device=s.device)
        mask = (seed, threshold(dropout_p), survivor_scale(dropout_p)) if masked else _NO_MASK
        torch.ops.lorafast_cuda.expand.default(
            s, lora_B, scaling, bias, *mask, y, warps, row_blocks
        )
        return y

    return run


_NO_MASK = None, 0, 1.0


def plan_lora_linear(problem: Problem, device: Device, fixed: Choices = NONE) -> Launch | str:
    """One launch for ``y`` and ``s`` of a layer whose launches would take longer than its work, or why
    there is none."""
    p = problem
    reason = why_not_in_one(p, device)
    if reason is not None:
        return reason
    columns = min(_COLUMNS, key=lambda columns: _clocks(p, device, columns))
    one, apart = seconds_in_one(p, device, columns), _apart(p, device).seconds
    if one >= apart and not fixed:
        return (
            f"one launch that shrinks in every tile takes longer, modelled {one * 1e6:,.0f} µs for "
            f"{apart * 1e6:,.0f} of three calls"
        )
    columns = next((n for n in _COLUMNS if n == fixed.get("columns")), columns)
    most = _stages(p, _table(device), columns)
    stages = max(2, min(fixed.get("stages", most), most))
    grid = -(-p.N // columns), -(-p.M // _ROWS)
    size, s = p.dtype.itemsize, p.M * p.r * wide(p.dtype).itemsize * ("s" in p.wants)
    moved = (p.M * p.K + p.N * p.K + p.M * p.N) * size + p.r * (
        p.K + p.N
    ) * p.adapter_dtype.itemsize
    return Launch(
        _run_lora_linear(p, columns, stages),
        f"lora_linear: {grid[0]} x {grid[1]} CTAs, {_ROWS} x {columns}, {stages} stages",
        2.0 * p.M * p.K * (p.N + grid[0] * p.r) + 2.0 * p.M * p.N * p.r,
        float(moved + s),
        choices={"columns": columns, "stages": stages},
    )


def why_not_in_one(p: Problem, device: Device) -> str | None:
    """Why the kernel of ``lora_linear`` can't serve a problem, a sentence, or None. How long it takes is
    another question."""
    if device.capability < _OLDEST:
        return f"a layer in one launch needs compute capability 8.0, this is {_said(device)}"
    if p.format != DENSE:
        return f"the weight is stored as {p.format}, a layer in one launch reads a dense one"
    if p.dtype not in _DTYPES:
        return f"x has dtype {p.dtype}, a layer in one launch takes float16, bfloat16 or float32"
    if p.adapter_dtype not in (p.dtype, torch.float32):
        return (
            f"adapters have dtype {p.adapter_dtype}, in one launch float32 or that of x, {p.dtype}"
        )
    if not 1 <= p.r <= _MOST_RANKS:
        return f"r is {p.r}, a layer in one launch takes 1 to {_MOST_RANKS}"
    if not 1 <= p.K < _MOST_K:
        return f"K is {p.K}, a layer in one launch takes 1 to {_MOST_K - 1}"
    if p.M > _ROWS * _MOST_GROUPS:
        return f"M is {p.M}, a layer in one launch takes up to {_ROWS * _MOST_GROUPS}"
    return None


def seconds_in_one(p: Problem, device: Device, columns: int) -> float:
    """What the launch takes by counts: whoever takes longer, the host or the device's busiest SM."""
    moved = (p.M * p.K + p.N * p.K + p.M * p.N) * p.dtype.itemsize / device.bandwidth
    return max(CALL_HOST, LAUNCH_SECONDS + max(_clocks(p, device, columns) / _CLOCK, moved))


def _clocks(p: Problem, device: Device, columns: int) -> float:
    """Of the SM with the most tiles. A warp's instructions of a K block, counted in tests/ptx: each of a
    CTA's four has a scheduler of its own."""
    tiles = -(-p.N // columns) * -(-p.M // _ROWS)
    blocks = -(-p.K * p.dtype.itemsize // _BLOCK)
    ranks = -(-p.r // 8)
    wide_a = p.adapter_dtype is not p.dtype
    if p.dtype is torch.float32:
        issued = 140 + 175 * (columns // 8 + ranks) + 240 * p.dropout
    else:
        rank = 430 if wide_a and p.dtype is torch.float16 else 25 if wide_a else 12
        issued = 140 + 9 * (columns // 8) + rank * ranks + 464 * p.dropout
    if min(p.layouts.x.rows, p.layouts.weight.rows, p.layouts.lora_A.rows) < 16:
        issued *= _BY_ELEMENT
    of_one = blocks * max(issued, _LEAST) + _ENDS  # a tile that has an SM to itself
    return max(of_one, -(-tiles // device.sms) * (blocks * issued + _ENDS / 2))


def _apart(p: Problem, device: Device) -> Estimate:
    """The same in three calls: s, its expansion, and PyTorch's GEMM accumulated onto that."""
    size, low = p.dtype.itemsize, wide(p.dtype).itemsize
    found = work(device, moved=float(p.M * p.K * size + p.M * p.r * low))
    found += work(device, moved=float(p.M * p.N * size + p.M * p.r * low))
    return found + base_gemm(p, device)


def _stages(p: Problem, table: Small, columns: int) -> int:
    """As many as fit into shared memory, which two do on every architecture."""
    return next(
        n for n in range(table.stages, 1, -1) if shared_bytes(p, columns, n) <= table.shared
    )


def shared_bytes(p: Problem, columns: int, stages: int) -> int:
    """Of a CTA: the stages, B and bias, as ``Places`` of csrc/cuda/lora_linear.cu has them."""
    ranks = -(-p.r // 16) * 16
    wide_a = p.dtype.itemsize == 2 and p.adapter_dtype is torch.float32
    stage = (_ROWS + columns) * _BLOCK + ranks * _BLOCK * (2 if wide_a else 1)
    factor = 2 if p.dtype is torch.bfloat16 else 4
    return stages * stage + columns * (ranks + 8) * factor + 4 * columns


def _table(device: Device) -> Small:
    return row_of(SMALL, device.capability)


def _run_lora_linear(p: Problem, columns: int, stages: int) -> Any:
    M, N, r, dtype, masked = p.M, p.N, p.r, p.dtype, p.dropout
    low = wide(dtype) if "s" in p.wants else None

    def run(
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        bias: Tensor | None = None,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        y = torch.empty((M, N), dtype=dtype, device=x.device)
        s = None if low is None else torch.empty((M, r), dtype=low, device=x.device)
        mask = (seed, threshold(dropout_p), survivor_scale(dropout_p)) if masked else _NO_MASK
        torch.ops.lorafast_cuda.lora_linear.default(
            x, weight, lora_A, lora_B, scaling, bias, *mask, y, s, columns, stages
        )
        return y, s

    return run


def _said(device: Device) -> str:
    return ".".join(map(str, divmod(device.capability, 10)))
