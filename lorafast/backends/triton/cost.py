"""What the Triton kernels take on a GPU: a model of their launches.

sm_90's GEMM, the shares of bandwidth, the rates of high ranks and what a mask takes were measured on an
H100 and an H200 (M = 8192, K = N = 4096, bf16, Triton 3.6); elsewhere they are assumed to be the same.
Published GEMMs in Triton-like languages reach 84 to 97 % of cuBLAS; on sm_100 the accumulator goes
through registers twice a tile.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

from lorafast.backends.cost import LAUNCH_SECONDS, Device, Estimate, base_gemm, record_of, work
from lorafast.backends.dequantized import dense as of_dense
from lorafast.backends.triton import planning, quantized
from lorafast.backends.triton.planning import HybridLaunch, Launch
from lorafast.core.dtypes import wide
from lorafast.core.problem import DENSE, LAYER_OPERATIONS, WEIGHT_NORM, Layout, Problem, parts
from lorafast.kernels.common.bottleneck_plan import (
    BottleneckBackwardLaunch,
    BottleneckLaunch,
    ColumnsLaunch,
)
from lorafast.kernels.common.codes_plan import CodesLaunch
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.decode_plan import DecodeLaunch
from lorafast.kernels.common.plan import (
    ExpandBackwardLaunch,
    ExpandLaunch,
    LinearExpandLaunch,
    LoraLinearLaunch,
    ShrinkBackwardLaunch,
    ShrinkLaunch,
    WeightNormLaunch,
)
from lorafast.kernels.common.scaled_plan import (
    ScaledGemmLaunch,
    ScaledLinearLaunch,
    ScaledPassLaunch,
)
from lorafast.kernels.tables.find import nearest_architecture

LAUNCH_HOST = 8e-6
"""Host time of a launch: 5 µs on a driver that does nothing (``lorafast.bench.call_overhead.launches``),
and an estimate of 3 for the driver's own share."""
TMA_HOST = 8e-6
"""What tensor descriptors add to it: 6 µs in the same way, and 2 for the driver's three maps."""
_GEMM = {90: 0.96, 100: 0.78}
_GEMM_ELSEWHERE = 0.9
"""Of cuBLAS, for 16-bit GEMMs."""
_TF32_GEMM = 0.5
"""Of cuBLAS: the rules for 32-bit elements have small tiles."""
_FLOAT32 = 0.3
"""Of the float32 rate: Triton's dot without tensor cores."""
_SKINNY = {"shrink": 0.67, "expand": 0.72, "shrink_backward": 0.75, "expand_backward": 0.6}
"""Of the bandwidth. Measured as above."""
_DEQUANTIZE = 0.85
"""Of the bandwidth, for a pass that makes W dense. Measured on an H200: 0.84 at 14336 x 4096."""
_SKINNY_RATE = {"shrink": 0.2, "shrink_backward": 0.18, "expand_backward": 0.22, "expand": 0.18}
"""Of the rate of 16-bit GEMMs, where the rank is so high that it counts. Measured as above, as are the
next two."""
_WIDE_RATE = 0.024
"""The same for float16, whose wide factor is two numbers in TF32."""
_THREE_TF32 = {"shrink": 0.07, "shrink_backward": 0.035}
"""The same for float32, of which a product is three in TF32."""
_BY_ELEMENT = 0.25
"""Of either where rows aren't aligned: the loads of the loop are one element wide, and not pipelined."""
_MASKED_NUMBERS = 6.5e9
"""Numbers under a mask that an SM goes through in a second, whatever its memory: 42 µs for ``shrink`` on
an H100 and on an H200, of which one reads as many without a mask in 36 µs and the other in 27."""
_MASKED_GEMM = 1.19
"""Times a GEMM whose low-rank term is masked. Measured on an H100 while its epilogue made the mask; now
it is made before the main loop, and executing both counts 0.6 of the cycles beside it. Not timed
since."""
_SCALED_PASS = 0.75
"""Of the bandwidth, for a pass that scales a matrix. Not measured: as ``shrink_backward``, which reads
and sums alike."""
_SCALED_LOAD = 0.75
"""Of the rate of a GEMM whose first tiles a vector multiplies, for which they go through registers. Not
measured, and so low that PyTorch's GEMM with a pass before it goes first wherever rows are many."""
_RANK_BLOCK = 0.05
"""More time for every block of the rank after the first. Measured as above."""
_NUMBERS = {0.5: 0.7e10, 1.0: 1.5e10}
"""Numbers that an SM makes of codes in a second, beside a GEMM, by the bytes of a code: 26 µs for NF4
with nested scales and 13 for int8 and fp8, measured on an H200 (16 rows, K = N = 4096)."""
_FEW_ROWS_GEMM = 0.3
"""Of the rate of a GEMM, in tiles of few rows that wait for W's numbers. Not measured."""
_DECODED = 0.5
"""Of the bandwidth, where one launch of few rows reads a dense W. Not measured, and so low that what was
measured of PyTorch's GEMMs gives way to it for launches alone."""
_OWN_STEP = 3e-7
"""Of a tile that makes its own ``s``, whose loads come from L2. Assumed."""
_FROM_L2 = 1.6
"""What L2 gives, times what memory does, or more. Assumed."""
_NOT_BACKWARD = "measured on an H100, they make a backward slower"
"""486 µs at best over helpers, rounds and tiles, where it is 442 one by one; sizes as above."""
_PARTIAL = 4
_BLOCK = 16
"""Triton sees that many elements' divisibility in an argument, and no less."""


def estimate(problem: Problem, device: Device) -> Estimate:
    """What the problem takes on ``device``."""
    if problem.operation not in LAYER_OPERATIONS:
        return _of(PLANNED[problem.operation](problem, device, None), problem, device)
    launch = in_one_launch(problem, device)
    if not isinstance(launch, str):
        return _of(launch, problem, device)
    found = _one_by_one(problem, device)
    if "dweight" in problem.wants:  # PyTorch's own
        found += base_gemm(problem._replace(transposed=True), device, accumulated=False)
    return found


def dequantized(problem: Problem, device: Device) -> Estimate:
    """What making a quantized weight dense takes: its codes are read, W is written."""
    moved = problem.N * problem.K * (quantized.code_bytes(problem) + problem.dtype.itemsize)
    return work(device, moved=moved, share=_DEQUANTIZE, host=LAUNCH_HOST)


def reads_codes(
    problem: Problem, device: Device, config: LaunchConfig | None = None
) -> CodesLaunch | None:
    """The launch of a ``linear_expand`` that reads a quantized weight's codes, where by the model it
    takes less time than making W dense does."""
    launch = planning.plan_codes(problem, device, config)
    if isinstance(launch, str):
        return None
    dense = dequantized(problem, device) + estimate(of_dense(problem), device)
    return launch if _of(launch, problem, device).seconds < dense.seconds else None


def of_codes(launch: CodesLaunch | DecodeLaunch, problem: Problem, device: Device) -> Estimate:
    """What a launch over codes takes."""
    return _of(launch, problem, device)


def in_one_launch(
    problem: Problem, device: Device, config: LaunchConfig | None = None
) -> DecodeLaunch | LoraLinearLaunch | str:
    """The launch that serves a layer's forward alone, or why there is none, as ``helped`` says it."""
    return decoded(problem, device, config) or helped(problem, device, config)


def decoded(
    problem: Problem, device: Device, config: LaunchConfig | None = None
) -> DecodeLaunch | None:
    """The launch of a layer's forward of few rows, over a dense weight or codes, where by the model it
    takes less time than the operations one by one. By a ``config``, which is that of a GEMM, they are
    asked for."""
    if problem.operation != "lora_linear" or config is not None:
        return None
    record = record_of(problem, device.name)
    if record is not None and record.config is not None:
        return None
    launch = planning.plan_decode(problem, device)
    if isinstance(launch, str):
        return None
    if problem.format == DENSE:
        apart = _one_by_one(problem, device)
    else:
        shrink, product = parts(problem)
        reads = reads_codes(product, device)
        if reads is None:
            apart = dequantized(product, device) + estimate(of_dense(product), device)
        else:
            apart = _of(reads, product, device)
        apart += estimate(shrink, device)
    return launch if _of(launch, problem, device).seconds < apart.seconds else None


def helped(
    problem: Problem, device: Device, config: LaunchConfig | None = None
) -> LoraLinearLaunch | str:
    """The launch with helpers that serves a layer's forward, or why there is none: they can't serve it,
    or the operations take less time one by one. By a ``config`` of its own it is asked for."""
    if problem.operation != "lora_linear":
        return _NOT_BACKWARD
    launch = planning.plan_lora_linear(problem, device, config)
    if isinstance(launch, str):
        return launch
    if config is not None or record_of(problem, device.name) is not None:
        return launch  # as it was measured, to be chosen or not
    together, apart = _of(launch, problem, device), _one_by_one(problem, device)
    if together.seconds < apart.seconds:
        return launch
    times = f"{together.seconds * 1e6:,.0f} µs with them, {apart.seconds * 1e6:,.0f} without"
    return f"they don't pay, modelled {times}"


def gemm(
    problem: Problem, device: Device, config: LaunchConfig | None = None
) -> LinearExpandLaunch | HybridLaunch:
    """The fused launch of a ``linear_expand`` or the hybrid one: as ``config`` says or what was
    measured, else what takes less time by the model. Where little is written the fused one: a launch of
    PyTorch's would do as well as ``expand``."""
    fused = planning.plan_linear_expand(problem, device, config)
    hybrid = planning.plan_hybrid(problem, device, config)
    if isinstance(hybrid, str):
        return fused
    own = config or planning.measured_config(problem, device)
    if own is not None:
        return hybrid if own.hybrid else fused
    if _of(hybrid.expand, problem, device).device < 2 * LAUNCH_SECONDS:
        return fused
    times = {launch: _of(launch, problem, device).seconds for launch in (fused, hybrid)}
    return min(times, key=times.__getitem__)


def scaled(
    problem: Problem, device: Device, config: LaunchConfig | None = None
) -> ScaledLinearLaunch:
    """The launch of a layer with a vector: its own GEMM, or PyTorch's and a pass where that takes less
    time by the model. By a ``config``, which is that of a GEMM, its own is asked for."""
    fused = planning.plan_scaled_linear(problem, device, config)
    if config is not None or fused.gemm is None:
        return fused
    apart = planning.plan_scaled_pass(problem, device)
    times = {launch: _of(launch, problem, device).seconds for launch in (fused, apart)}
    return min(times, key=times.__getitem__)


def _one_by_one(problem: Problem, device: Device) -> Estimate:
    return sum((estimate(part, device) for part in parts(problem)), Estimate())


PLANNED: dict[str, Callable[[Problem, Device, LaunchConfig | None], Launch]] = {
    "shrink": planning.plan_shrink,
    "expand": planning.plan_expand,
    "linear_expand": gemm,
    "expand_backward": planning.plan_expand_backward,
    "shrink_backward": planning.plan_shrink_backward,
    WEIGHT_NORM: planning.plan_weight_norm,
    "bottleneck": planning.plan_bottleneck,
    "bottleneck_backward": planning.plan_bottleneck_backward,
    "scaled_linear": scaled,
    "scaled_linear_backward": scaled,
}


@functools.singledispatch
def _of(launch: Launch, p: Problem, device: Device) -> Estimate:
    raise NotImplementedError(type(launch))


@_of.register
def _shrink(launch: ShrinkLaunch, p: Problem, device: Device) -> Estimate:
    if p.operation == "expand_backward":
        p = planning.as_shrink(p)
    _, count, ranks = launch.grid
    s = p.M * p.r
    moved = float(ranks * p.M * p.K * p.dtype.itemsize) + p.r * p.K * p.adapter_dtype.itemsize
    moved += s * wide(p.dtype).itemsize + _partials(count, s)
    found = _skinny("shrink", p, device, 2.0 * p.M * p.K * p.r, moved, "x", p.layouts.x, p.K)
    return _masked(found, p, ranks * p.M * p.K, device)


@_of.register
def _expand(launch: ExpandLaunch, p: Problem, device: Device) -> Estimate:
    """y is written once; s and B, which are read again and again, come from the cache."""
    y = launch.M * launch.N
    moved = float(y * p.dtype.itemsize) + launch.M * launch.r * wide(p.dtype).itemsize
    moved += launch.N * launch.r * p.adapter_dtype.itemsize
    fresh = Layout.fresh(launch.M, launch.N, p.dtype)
    found = _skinny("expand", p, device, 2.0 * y * launch.r, moved, "y", fresh, launch.N)
    return _masked(found, p, y, device)


@_of.register
def _hybrid(launch: HybridLaunch, p: Problem, device: Device) -> Estimate:
    return _expand(launch.expand, p, device) + base_gemm(p, device)


@_of.register
def _shrink_backward(launch: ShrinkBackwardLaunch, p: Problem, device: Device) -> Estimate:
    cols, count, ranks = launch.grid
    dA = p.r * p.K
    moved = float(ranks * p.M * p.K * p.dtype.itemsize) + cols * p.M * p.r * wide(p.dtype).itemsize
    moved += dA * p.adapter_dtype.itemsize + _partials(count, dA)
    found = _skinny(
        "shrink_backward", p, device, 2.0 * p.M * p.K * p.r, moved, "x", p.layouts.x, p.K
    )
    return _masked(found, p, ranks * p.M * p.K, device)


@_of.register
def _expand_backward(launch: ExpandBackwardLaunch, p: Problem, device: Device) -> Estimate:
    """dy once for all results; ds is added up in a second launch, dB by whoever comes last."""
    cols, rows, ranks = launch.grid
    low = wide(p.dtype).itemsize
    products = len({"ds", "dB"} & set(p.wants))
    moved = float(ranks * p.M * p.N * p.dtype.itemsize) + 2 * p.N * p.r * p.adapter_dtype.itemsize
    launches = 1
    if "ds" in p.wants:
        moved += 2 * _PARTIAL * cols * p.M * p.r + p.M * p.r * low
        launches += 1
    if "dB" in p.wants:
        moved += _partials(rows, p.N * p.r) + p.M * p.r * low
    return _skinny(
        "expand_backward",
        p,
        device,
        2.0 * products * p.M * p.N * p.r,
        moved,
        "dy",
        p.layouts.dy,
        p.N,
        launches,
    )


@_of.register
def _weight_norm(launch: WeightNormLaunch, p: Problem, device: Device) -> Estimate:
    """W once, at the rates of ``shrink``; A, which every program reads, comes from the cache. Not
    measured."""
    W, low = p.N * p.K, (p.N + p.K) * p.r
    rate = device.flops * _THREE_TF32["shrink"]
    if p.adapter_dtype.itemsize == 2:
        rate = device.flops * _SKINNY_RATE["shrink"]
    moved = float(W * p.dtype.itemsize + low * p.adapter_dtype.itemsize)
    share = _SKINNY["shrink"] * min(launch.programs / device.sms, 1.0)
    return work(device, flops=2.0 * p.r * W, rate=rate, moved=moved, share=share, host=LAUNCH_HOST)


@_of.register
def _bottleneck(launch: BottleneckLaunch, p: Problem, device: Device) -> Estimate:
    """h, or dy of a backward, once for each pass as if L2 kept none of it, and what is written. The
    factors, which every program reads, come from L2, and a program's steps one after the other. Not
    measured."""
    (row_blocks, groups), size = launch.grid, p.dtype.itemsize
    M, K, N, b = launch.M, launch.K, launch.N, launch.b
    forward, programs = p.operation == "bottleneck", row_blocks * groups
    moved = float(M * ((1 + (N > 0)) * K + N) * size + 3 * M * b * wide(p.dtype).itemsize)
    if forward and p.residual:
        moved -= float(M * (K - N) * size)  # it is read instead of h
    factors = float(b * (K * groups + N) * row_blocks * p.adapter_dtype.itemsize)
    again = float(M * K * (groups - 1) * size)
    if launch.split:  # a program reads its share of columns alone
        factors, again = float(b * K * row_blocks * p.adapter_dtype.itemsize), 0.0
        moved += _partials(groups, M * b)
    times = 1 if launch.split else groups
    matrix = ("h", p.layouts.x, p.K) if forward else ("dy", p.layouts.dy, p.N)
    found = _skinny("shrink", p, device, 2.0 * M * b * (K * times + N), moved, *matrix)
    c = launch.config
    steps = launch.k_blocks + launch.n_blocks
    waves = _blocks(programs, device.sms * c.ctas_per_sm)
    least = max((factors + again) / (_FROM_L2 * device.bandwidth), waves * steps * _OWN_STEP)
    return replace(found, device=max(found.device, least + LAUNCH_SECONDS))


@_of.register
def _bottleneck_backward(launch: BottleneckBackwardLaunch, p: Problem, device: Device) -> Estimate:
    """Its launches, one after the other."""
    found = Estimate()
    if launch.rows is not None:
        found += _of(launch.rows, p, device)
    if launch.columns is not None:
        found += _bottleneck_columns(launch.columns, p, device)
    return found


def _bottleneck_columns(launch: ColumnsLaunch, p: Problem, device: Device) -> Estimate:
    """dy and h as ``shrink_backward`` reads its x, beside which dh is written; da and z, which every
    column block reads, come from memory once. Not measured."""
    wants, (blocks, groups, ranks) = launch.wants, launch.grid
    M, size, adapter = p.M, p.dtype.itemsize, p.adapter_dtype.itemsize
    low = M * p.r * wide(p.dtype).itemsize
    summed = {"dU": p.N * p.r, "du": p.N, "dD": p.K * p.r}
    read = {"dy": launch.of_dy * M * p.N, "h": ("dD" in wants) * M * p.K}
    written = M * p.K if "dh" in wants else 0
    moved = float((ranks * sum(read.values()) + written) * size)
    moved += low * len({"dU", "dD", "dh"} & {*wants})
    moved += sum(
        summed[name] * adapter + _partials(groups, summed[name]) for name in summed if name in wants
    )
    terms = sum(summed[name] for name in ("dU", "dD") if name in wants) * M + written * p.r
    matrix = ("dy", p.layouts.dy, p.N) if launch.of_dy else ("h", p.layouts.x, p.K)
    found = _skinny("shrink_backward", p, device, 2.0 * terms, moved, *matrix)
    from_l2 = float(blocks * low)
    least = from_l2 / (_FROM_L2 * device.bandwidth)
    return replace(found, device=max(found.device, least + LAUNCH_SECONDS))


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


@_of.register
def _linear_expand(launch: LinearExpandLaunch, p: Problem, device: Device) -> Estimate:
    size = p.dtype.itemsize
    flops = 2.0 * launch.M * launch.K * launch.N
    moved = float(launch.M * launch.K + launch.K * launch.N + launch.M * launch.N) * size
    moved += _partials(launch.splits, launch.M * launch.N)
    rate, share, remark = _gemm_rate(p, device), 1.0, ""
    if not launch.tma:
        read = ("dy", p.layouts.dy, p.N) if p.transposed else ("x", p.layouts.x, p.K)
        weight, length = p.layouts.weight, p.K
        if not weight.rows:  # it lies in memory as its transpose does, whose rows are read as well
            weight, length = Layout(weight.columns), p.N
        for name, layout, of_row in (read, ("weight", weight, length)):
            if not _aligned(layout, of_row):
                share, remark = _BY_ELEMENT, _said(name)
    if launch.dropout:
        rate /= _MASKED_GEMM
    rate /= 1 + _RANK_BLOCK * max(-(-launch.r // launch.config.block_r) - 1, 0)
    if p.dtype.itemsize == 4 and not p.tf32:
        remark = "; ".join(filter(None, (remark, "float32 uses no tensor cores in Triton")))
    host = LAUNCH_HOST + (TMA_HOST if launch.tma else 0.0)
    return work(
        device, flops=flops, rate=rate * share, moved=moved, share=share, host=host, remark=remark
    )


@_of.register
def _scaled_linear(launch: ScaledLinearLaunch, p: Problem, device: Device) -> Estimate:
    """A GEMM and a pass, as far as they are there."""
    found, one = Estimate(), None
    if launch.gemm is not None:
        one = _scaled_gemm(launch.gemm, p, device)
    elif p.operation == "scaled_linear" or p.scales_input or "dx" in p.wants:
        one = base_gemm(p, device, accumulated=False)
    for part in (one, None if launch.rows is None else _scaled_pass(launch.rows, p, device)):
        found += Estimate() if part is None else part
    return found


def _scaled_gemm(launch: ScaledGemmLaunch, p: Problem, device: Device) -> Estimate:
    """That of ``linear_expand``, and what is read and written beside it."""
    gemm = _linear_expand(launch.gemm, p, device)
    M, N, size = launch.gemm.M, launch.gemm.N, p.dtype.itemsize
    more = launch.keeps + launch.sums - (not launch.writes)
    moved = gemm.bytes + M * N * size * more
    slower = (gemm.device - LAUNCH_SECONDS) / (_SCALED_LOAD if launch.at_load else 1.0)
    seconds = max(slower, moved / device.bandwidth) + LAUNCH_SECONDS
    found = replace(gemm, device=seconds, bytes=moved)
    return found + _sums(launch.row_blocks, N, device) if launch.sums else found


def _scaled_pass(launch: ScaledPassLaunch, p: Problem, device: Device) -> Estimate:
    """What it reads and writes, once."""
    M, N = launch.M, launch.N
    moved = float(M * N * p.dtype.itemsize * (1 + launch.writes + launch.sums))
    found = work(device, moved=moved, share=_SCALED_PASS, host=LAUNCH_HOST)
    return found + _sums(launch.grid[1], N, device) if launch.sums else found


def _sums(count: int, N: int, device: Device) -> Estimate:
    """Partial sums, read and added up; those who wrote them wrote as much."""
    return work(device, moved=2.0 * _PARTIAL * count * N, host=LAUNCH_HOST)


@_of.register
def _codes(launch: CodesLaunch, p: Problem, device: Device) -> Estimate:
    """Codes are read once, their numbers are made for each row block, before they are multiplied."""
    size = p.dtype.itemsize
    moved = p.N * p.K * quantized.code_bytes(p) + float(p.M * p.K + p.M * p.N) * size
    moved += _partials(launch.splits, launch.M * launch.N)
    found = work(device, moved=moved, share=_DEQUANTIZE, host=LAUNCH_HOST)
    seconds = _few_rows(p, launch.row_blocks, launch.config.block_m, device)
    slower = max(found.device, seconds + LAUNCH_SECONDS)
    return replace(found, device=slower, flops=2.0 * p.M * p.K * p.N)


def _few_rows(p: Problem, row_blocks: int, block_m: int, device: Device) -> float:
    """Seconds of the SMs for a product over codes or a dense W: numbers are made, then multiplied."""
    seconds = 2.0 * row_blocks * block_m * p.K * p.N / (_gemm_rate(p, device) * _FEW_ROWS_GEMM)
    if p.format != DENSE:
        seconds += row_blocks * p.N * p.K / (_NUMBERS[quantized.code_bytes(p)] * device.sms)
    return seconds


@_of.register
def _decode(launch: DecodeLaunch, p: Problem, device: Device) -> Estimate:
    """W is read once, codes as ``_codes`` has it. Helpers are done before the tiles are; without them
    each tile goes through A."""
    size, adapter, s = p.dtype.itemsize, p.adapter_dtype.itemsize, p.M * p.r
    dense = p.format == DENSE
    moved = p.N * p.K * (size if dense else quantized.code_bytes(p))
    moved += float((p.M * p.K + p.M * p.N) * size + p.r * (p.K + p.N) * adapter)
    moved += s * wide(p.dtype).itemsize + 2.0 * _PARTIAL * launch.shares * s
    moved += _partials(launch.splits, p.M * p.N)
    share = _DECODED if dense else _DEQUANTIZE
    found = work(device, moved=moved, share=share, host=LAUNCH_HOST)
    seconds = _few_rows(p, 1, launch.config.block_m, device)
    slower = max(found.device, seconds + LAUNCH_SECONDS)
    if not launch.shares:
        slower += -(-p.K // launch.helper_k) * launch.rank_blocks * _OWN_STEP
    return replace(found, device=slower, flops=2.0 * p.M * (p.K * p.N + p.r * (p.K + p.N)))


@_of.register
def _lora_linear(launch: LoraLinearLaunch, p: Problem, device: Device) -> Estimate:
    """The skinny work hides beside the GEMM, whose other programs go through as many rounds more as
    helpers miss."""
    gemm = _of(launch.gemm, p, device)
    thin = Estimate(flops=2.0 * p.M * p.K * p.r, bytes=float(p.r * p.K * p.adapter_dtype.itemsize))
    more = launch.helpers.rounds / launch.helpers.alone - 1
    return gemm + Estimate(device=gemm.device * more) + thin


def _skinny(
    kernel: str,
    p: Problem,
    device: Device,
    flops: float,
    moved: float,
    name: str,
    layout: Layout,
    length: int,
    launches: int = 1,
) -> Estimate:
    """A pass over the matrix ``name``, whose rows have ``length`` elements."""
    share, remark = _SKINNY[kernel], ""
    if not _aligned(layout, length):
        share, remark = share * _BY_ELEMENT, _said(name)
    if p.dtype.itemsize == 4 and not p.tf32:
        thirds = _THREE_TF32.get(kernel)
        rate = device.flops * thirds if thirds else device.float32_flops * _FLOAT32
    elif wide(p.dtype) is not p.dtype:
        rate = device.flops * _WIDE_RATE
    else:
        rate = device.rate(p.dtype, p.tf32) * _SKINNY_RATE[kernel]
    return work(
        device, flops=flops, rate=rate, moved=moved, share=share, launches=launches,
        host=LAUNCH_HOST, remark=remark,
    )  # fmt: skip


def _gemm_rate(p: Problem, device: Device) -> float:
    rate = device.rate(p.dtype, p.tf32)
    if p.dtype.itemsize == 2:
        return rate * _GEMM.get(nearest_architecture(device.capability), _GEMM_ELSEWHERE)
    return rate * (_TF32_GEMM if p.tf32 else _FLOAT32)


def _masked(found: Estimate, p: Problem, elements: int, device: Device) -> Estimate:
    """The same under the problem's mask of so many elements, which is made beside the loads."""
    if not p.dropout:
        return found
    seconds = elements / (_MASKED_NUMBERS * device.sms) + found.launches * LAUNCH_SECONDS
    return replace(found, device=max(found.device, seconds))


def _partials(count: int, size: int) -> float:
    """Bytes of partial sums, written and read; one is none."""
    return 2.0 * _PARTIAL * count * size if count > 1 else 0.0


def _aligned(layout: Layout, length: int) -> bool:
    """Whether a loop over rows of ``length`` elements loads 16 bytes at a time: that takes aligned rows,
    and a length whose divisibility the compiler sees."""
    return layout.rows == 16 and length % _BLOCK == 0


def _said(name: str) -> str:
    return (
        f"the rows of {name} aren't aligned to 16 bytes, or end within a block: element by element"
    )
