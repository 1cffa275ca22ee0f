"""What is bound by launches or writes: ``expand``, a small layer's forward or backward in one launch.

Sizes are decided here; ``run`` only launches. Kernels: csrc/cuda/expand.cu, csrc/cuda/lora_linear.cu,
csrc/cuda/lora_linear_backward.cu.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorafast.backends.cost import LAUNCH_SECONDS, Device, Estimate, base_gemm, work
from lorafast.backends.cuda.launch import CALL_HOST, NONE, Choices, Launch, mask_of
from lorafast.backends.cuda.tables import SMALL, Small, row_of
from lorafast.core.dtypes import wide
from lorafast.core.problem import DENSE, Layout, Problem
from lorafast.kernels.common.counters import counters

_OLDEST = 80
"""Of a layer in one launch, whose kernels have no way to shared memory but cp.async."""
_OLDEST_OF_EXPAND, _BFLOAT16 = 75, 80
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

_OWN = 16
"""Bytes of shared memory that the backward's kernel declares itself, for the number that ``arrive``
hands round: they count too."""
_CLOCK = 1.7e9
_ENDS = 3000
"""Clocks of a tile before its first and after its last K block: latencies of memory, B, y."""
_LEAST = 500
"""Clocks of a K block, however little is in it: a barrier, and loads and products that wait for each
other. Assumed, not measured."""
_TENSOR = 0.5
"""Of the device's rate that the products of a small tile reach. Assumed, not measured."""
_WIDE, _FLOAT32 = 5, 9
"""Times that a product takes of float16 by float32, and of float32: two or three in TF32, at half the
rate, and what the last bits are multiplied by."""
_ELEMENTS = 700
"""Clocks of 16 bytes that a thread loads by elements. Assumed, not measured."""
_BY_ELEMENT = 8
"""Times as many instructions in a K block of rows that aren't aligned."""


def plan_expand(problem: Problem, device: Device, fixed: Choices = NONE) -> Launch | str:
    """The launch of ``y = drop(scaling · s·Bᵀ)``, or why there is none.

    Its ``run`` takes ``bias`` as a sixth argument, which is added before y is rounded, and as a seventh
    a contiguous ``y`` of float16, onto which all is added in place.
    """
    p, table = problem, _table(device)
    if device.capability < _OLDEST_OF_EXPAND:
        return f"expand needs compute capability 7.5, this is {_said(device)}"
    if p.dtype is torch.bfloat16 and device.capability < _BFLOAT16:
        return f"expand needs compute capability 8.0 in bfloat16, this is {_said(device)}"
    if p.dtype not in _DTYPES:
        return f"y has dtype {p.dtype}, expand writes float16, bfloat16 or float32"
    if p.r < 1:
        return f"r is {p.r}, expand takes 1 or more"
    half = p.dtype is torch.bfloat16
    slice_ = 16 if half else 8
    slices = -(-p.r // slice_)
    fitting = [w for w in (4, 2, 1) if w <= table.column_warps and slices <= _most_slices(w, table)]
    if not fitting:
        most = _most_slices(1, table) * slice_
        return f"r is {p.r}, expand keeps up to {most} ranks in shared memory"
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


def _most_slices(warps: int, table: Small) -> int:
    """Slices of B that there is room for, of 1 KB for each of so many warps side by side, with the bias
    and two stages of one slice of s."""
    bias, stages = 4 * _SPAN * warps, 2 * _WARPS // warps * 32 * 48
    return min(_MOST_SHARED, table.shared - bias - stages) // (1024 * warps)


def _run_expand(p: Problem, warps: int, row_blocks: int) -> Any:
    M, N, dtype, masked = p.M, p.N, p.dtype, p.dropout

    def run(
        s: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
        bias: Tensor | None = None,
        onto: Tensor | None = None,
    ) -> Tensor:
        y = torch.empty((M, N), dtype=dtype, device=s.device) if onto is None else onto
        mask = mask_of(masked, dropout_p, seed)
        torch.ops.lorafast_cuda.expand.default(
            s, lora_B, scaling, bias, *mask, y, warps, row_blocks, onto is not None
        )
        return y

    return run


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
        seconds=device_seconds_in_one(p, device, columns),
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
    return max(CALL_HOST, device_seconds_in_one(p, device, columns))


def device_seconds_in_one(p: Problem, device: Device, columns: int) -> float:
    """Of these the device's."""
    moved = (p.M * p.K + p.N * p.K + p.M * p.N) * p.dtype.itemsize / device.bandwidth
    return LAUNCH_SECONDS + max(_clocks(p, device, columns) / _CLOCK, moved)


def _clocks(p: Problem, device: Device, columns: int) -> float:
    """Of the SM with the most tiles. A warp's instructions of a K block, counted in tests/ptx: each of a
    CTA's four has a scheduler of its own."""
    tiles = -(-p.N // columns) * -(-p.M // _ROWS)
    blocks = -(-p.K * p.dtype.itemsize // _BLOCK)
    ranks = -(-p.r // 8)
    wide_a = p.adapter_dtype is not p.dtype
    issued: float
    if p.dtype is torch.float32:
        issued = 140 + 175 * (columns // 8 + ranks) + 240 * p.dropout
    else:
        rank = 430 if wide_a and p.dtype is torch.float16 else 25 if wide_a else 12
        issued = 140 + 9 * (columns // 8) + rank * ranks + 464 * p.dropout
    if min(p.layouts.x.rows, p.layouts.weight.rows, p.layouts.lora_A.rows) < 16:
        issued *= _BY_ELEMENT
    issued = max(issued, _product_clocks(p, device, columns, 8 * ranks, wide_a))
    of_one = blocks * max(issued, _LEAST) + _ENDS  # a tile that has an SM to itself
    return max(of_one, -(-tiles // device.sms) * (blocks * issued + _ENDS / 2))


def _product_clocks(p: Problem, device: Device, columns: int, ranks: int, wide: bool) -> float:
    """Of an SM's tensor cores for a K block of so many columns of W and of A; ``wide``: A is float32."""
    if p.dtype is torch.float32:
        wide_columns = _FLOAT32 * (columns + ranks)
    else:
        two = wide and p.dtype is torch.float16
        wide_columns = columns + (_WIDE if two else 1) * ranks
    flops = 2.0 * _ROWS * _BLOCK / p.dtype.itemsize * wide_columns
    return flops * device.sms / (device.flops * _TENSOR) * _CLOCK


def _apart(p: Problem, device: Device) -> Estimate:
    """The same in three calls: s, its expansion, and PyTorch's GEMM accumulated onto that."""
    size, low = p.dtype.itemsize, wide(p.dtype).itemsize
    found = work(device, moved=float(p.M * p.K * size + p.M * p.r * low))
    found += work(device, moved=float(p.M * p.N * size + p.M * p.r * low))
    return found + base_gemm(p, device)


def _stages(
    p: Problem, table: Small, columns: int, of: Callable[[Problem, int, int], int] | None = None
) -> int:
    """As many as fit into shared memory, which two do on every architecture; ``of`` counts its bytes."""
    of = of or shared_bytes
    return next(n for n in range(table.stages, 1, -1) if of(p, columns, n) + _OWN <= table.shared)


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
        mask = mask_of(masked, dropout_p, seed)
        torch.ops.lorafast_cuda.lora_linear.default(
            x, weight, lora_A, lora_B, scaling, bias, *mask, y, s, columns, stages
        )
        return y, s

    return run


Gradients = tuple[Tensor | None, None, Tensor | None, Tensor | None, Tensor | None]
"""``dx``, no ``dweight``, ``dA``, ``dB``, ``dbias``; None for what isn't wanted."""


def plan_lora_linear_backward(
    problem: Problem, device: Device, fixed: Choices = NONE
) -> Launch | str:
    """One launch for what is wanted of ``dx``, ``dA``, ``dB`` and ``dbias`` of a layer whose launches
    would take longer than its work, or why there is none.

    ``run(dy, x, weight, lora_A, lora_B, s, scaling, dropout_p, seed)`` returns ``Gradients``.
    """
    p = problem
    reason = why_no_backward_in_one(p, device)
    if reason is not None:
        return reason
    columns = min(_COLUMNS, key=lambda columns: _backward_clocks(p, device, columns))
    one = backward_seconds_in_one(p, device, columns)
    apart = _backward_apart(p, device).seconds
    if one >= apart and not fixed:
        return (
            f"a backward in one launch takes longer, modelled {one * 1e6:,.0f} µs for "
            f"{apart * 1e6:,.0f} of its operations"
        )
    columns = next((n for n in _COLUMNS if n == fixed.get("columns")), columns)
    most = _stages(p, _table(device), columns, backward_shared_bytes)
    stages = max(2, min(fixed.get("stages", most), most))
    rows, dB, dA = backward_ctas(p, columns)
    parts = [
        f"{count} for {what}"
        for count, what in (
            (rows, f"ds and dx, {_ROWS} x {columns}" if "dx" in p.wants else "ds"),
            (dB, " and ".join(name for name in ("dB", "dbias") if name in p.wants)),
            (dA, "dA"),
        )
        if count
    ]
    return Launch(
        _run_lora_linear_backward(p, columns, stages),
        f"lora_linear_backward: {rows + dB + dA} CTAs, {', '.join(parts)}, {stages} stages",
        _backward_flops(p, columns),
        _backward_moved(p),
        choices={"columns": columns, "stages": stages},
        seconds=backward_device_seconds(p, device, columns),
    )


def why_no_backward_in_one(p: Problem, device: Device) -> str | None:
    """Why the kernel of ``lora_linear_backward`` can't serve a problem, a sentence, or None."""
    if "dweight" in p.wants:
        return "dweight is wanted, a backward in one launch has dx, dA, dB and dbias"
    if not p.wants:
        return "nothing is wanted of the backward"
    if not 1 <= p.N < _MOST_K:
        return f"N is {p.N}, a backward in one launch takes 1 to {_MOST_K - 1}"
    return why_not_in_one(p, device)


def backward_ctas(p: Problem, columns: int) -> tuple[int, int, int]:
    """How many CTAs there are for ds and dx, for dB and dbias, for dA."""
    want_dx, want_dA = "dx" in p.wants, "dA" in p.wants
    across = -(-p.K // columns) if want_dx else int(want_dA)
    of_dB = -(-p.N // _ROWS) if "dB" in p.wants or "dbias" in p.wants else 0
    return -(-p.M // _ROWS) * across, of_dB, -(-p.K // _ROWS) if want_dA else 0


def backward_seconds_in_one(p: Problem, device: Device, columns: int) -> float:
    """As ``seconds_in_one``."""
    return max(CALL_HOST, backward_device_seconds(p, device, columns))


def backward_device_seconds(p: Problem, device: Device, columns: int) -> float:
    """Of these the device's."""
    moved = _backward_moved(p) / device.bandwidth
    return LAUNCH_SECONDS + max(_backward_clocks(p, device, columns) / _CLOCK, moved)


def _backward_clocks(p: Problem, device: Device, columns: int) -> float:
    """From the first CTA's start to the last one's end: a CTA that makes ds and, after it, one that
    makes dA of it; or the instructions of all, if there are many for each SM. Those of a warp in a block
    are counted in tests/ptx."""
    rows, dB, dA = backward_ctas(p, columns)
    elements = _BLOCK // p.dtype.itemsize
    along, down = -(-p.N // elements), -(-p.M // elements)
    ranks, wide_b = -(-p.r // 8), p.adapter_dtype is not p.dtype
    tiles = columns // 8 if "dx" in p.wants else 0
    of_rows: float
    of_columns: float
    if p.dtype is torch.float32:
        of_rows, of_columns = 362 + 163 * (tiles + ranks), 333 + 168 * ranks
    else:
        half = p.dtype is torch.float16
        rank = 453 if wide_b and half else 63 if wide_b else 20
        of_rows = 130 + 11 * tiles + rank * ranks
        of_columns = 201 + 402 * ranks if half else 90 + 13 * ranks
    of_rows = max(of_rows, _product_clocks(p, device, 8 * tiles, 8 * ranks, wide_b))
    of_columns = max(of_columns, _product_clocks(p, device, 0, 8 * ranks, wide=True))
    masked = of_columns + 480 * p.dropout
    at, threads = p.layouts, 2 * _ROWS

    def by_element(layout: Layout, row_bytes: int, rows: int) -> int:
        return (layout.rows < 16) * _ELEMENTS * (rows * row_bytes // (16 * threads))

    of_dy = by_element(at.dy, _BLOCK, _ROWS)
    of_rows += of_dy + by_element(at.weight, 8 * tiles * p.dtype.itemsize, elements)
    of_rows += by_element(at.lora_B, _padded(p.r) * p.adapter_dtype.itemsize, elements)
    of_columns += of_dy + by_element(at.s, _padded(p.r) * wide(p.dtype).itemsize, elements)
    masked += by_element(at.x, _BLOCK, _ROWS)

    def alone(blocks: int, issued: float) -> float:
        return blocks * max(issued, _LEAST) + _ENDS

    longest = [alone(along, of_rows)] if rows else [0.0]
    if dB:
        longest.append(alone(down, of_columns))
    if dA:
        longest.append(longest[0] + alone(down, masked))
    issued = sum(
        -(-count // device.sms) * (blocks * each + _ENDS / 2)
        for count, blocks, each in (
            (rows, along, of_rows),
            (dB, down, of_columns),
            (dA, down, masked),
        )
    )
    return max(*longest, issued)


def _backward_apart(p: Problem, device: Device) -> Estimate:
    """The same in a call each: ds, dB and dbias of dy, dA of x, and dx as an expansion and PyTorch's
    GEMM accumulated onto that."""
    size, found = p.dtype.itemsize, Estimate()
    for name in _made(p):
        read = p.K if name in ("dA", "dx") else p.N
        found += work(device, moved=float(p.M * read * size))
    if "dx" in p.wants:
        found += base_gemm(p._replace(transposed=True), device)
    return found


def _made(p: Problem) -> list[str]:
    """What is wanted, and ``ds`` where something is made of it."""
    return ["ds"] * ("dx" in p.wants or "dA" in p.wants) + list(p.wants)


def _backward_flops(p: Problem, columns: int) -> float:
    rows, _, _ = backward_ctas(p, columns)
    flops = 2.0 * rows * _ROWS * p.N * p.r  # ds, for each of them
    flops += 2.0 * p.M * p.K * (p.N + p.r) * ("dx" in p.wants)
    flops += 2.0 * p.M * p.r * (p.N * ("dB" in p.wants) + p.K * ("dA" in p.wants))
    return flops + p.M * p.N * ("dbias" in p.wants)


def _backward_moved(p: Problem) -> float:
    """Bytes of each matrix once; of ds, written and read."""
    size, low, adapters = p.dtype.itemsize, wide(p.dtype).itemsize, p.adapter_dtype.itemsize
    wants = {name: name in p.wants for name in ("dx", "dA", "dB", "dbias")}
    moved = p.M * p.N * size + p.N * size * wants["dbias"]
    moved += wants["dx"] * ((p.M * p.K + p.N * p.K) * size + p.r * p.K * adapters)
    moved += wants["dA"] * (p.M * p.K * size + 2 * p.M * _padded(p.r) * low + p.r * p.K * adapters)
    moved += wants["dB"] * (p.M * p.r * low + p.N * p.r * adapters)
    return float(moved + ("ds" in _made(p)) * p.N * p.r * adapters)


def _padded(r: int) -> int:
    """As the kernel rounds ranks up."""
    return 16 if r <= 16 else 32 if r <= 32 else 64


def backward_shared_bytes(p: Problem, columns: int, stages: int) -> int:
    """Of a CTA: the stages and A, as ``BackwardPlaces`` of lora_linear_backward.cu has them."""
    ranks, size, low = _padded(p.r), p.dtype.itemsize, wide(p.dtype).itemsize
    pad = 32 if size == 4 else 16
    beside = 4 if low == 4 or _reads_wide_b(p) else size
    rows = _BLOCK // size
    stage = _ROWS * (_BLOCK + 16) + rows * (columns * size + pad) + rows * (ranks * beside + pad)
    return stages * stage + columns * (ranks + 8) * low


def _reads_wide_b(p: Problem) -> bool:
    return "ds" in _made(p) and p.dtype.itemsize == 2 and p.adapter_dtype is torch.float32


_COUNTERS = 3
"""Tickets, row blocks of ds, CTAs of dA."""


def _run_lora_linear_backward(p: Problem, columns: int, stages: int) -> Any:
    M, N, K, r, dtype, adapters, low = p.M, p.N, p.K, p.r, p.dtype, p.adapter_dtype, wide(p.dtype)
    masked, ranks = p.dropout, _padded(p.r)
    want_dx, want_dA, want_dB, want_dbias = (
        name in p.wants for name in ("dx", "dA", "dB", "dbias")
    )

    def run(
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        s: Tensor | None,
        scaling: float,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> Gradients:
        device = dy.device
        dx = torch.empty((M, K), dtype=dtype, device=device) if want_dx else None
        dB = torch.empty((N, r), dtype=adapters, device=device) if want_dB else None
        dbias = torch.empty((N,), dtype=dtype, device=device) if want_dbias else None
        dA = ds = counted = None
        if want_dA:
            dA = torch.empty((r, K), dtype=adapters, device=device)
            ds = torch.empty((M, ranks), dtype=low, device=device)
            counted = counters(dy, _COUNTERS)
        mask = mask_of(masked, dropout_p, seed)
        torch.ops.lorafast_cuda.lora_linear_backward.default(
            dy, x, weight, lora_A, lora_B, s, scaling, *mask, dx, dA, dB, dbias, ds, counted, columns,
            stages,
        )  # fmt: skip
        return dx, None, dA, dB, dbias

    return run


def _said(device: Device) -> str:
    return ".".join(map(str, divmod(device.capability, 10)))
