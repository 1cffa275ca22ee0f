"""``csrc/cuda/lora_linear_sm90.cu``: ``linear_expand`` on Hopper, one accumulator for both terms.

A persistent kernel whose warps load by TMA, multiply by ``wgmma`` or write the low-rank factors. Tiles
come from a queue. What TMA can't read is refused.
"""

import torch
from torch import Tensor

from lorafast.backends.cost import Device
from lorafast.backends.cuda.launch import Launch
from lorafast.backends.cuda.tables import WGMMA
from lorafast.backends.plan import Run
from lorafast.core.dtypes import wide
from lorafast.core.problem import DENSE, Layout, Problem
from lorafast.kernels.common.counters import counters
from lorafast.reference.dropout import survivor_scale, threshold

_DTYPES = (torch.bfloat16, torch.float16)
_ADAPTERS = (torch.bfloat16, torch.float16, torch.float32)
_MOST_RANKS = 1 << 20
_ROWS = 128
"""Of a tile of y."""
_COUNTERS = 4
_TMA = 16
"""Bytes of which the address of each row is a multiple that TMA reads or writes."""
_NO_MASK = None, 0, 1.0


def plan_linear_expand(problem: Problem, device: Device) -> Launch | str:
    """The launch of ``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias``, transposed of ``x·W + …``, or why there
    is none: a sentence. ``run`` takes what ``Plan`` says."""
    p = problem
    reason = why_refused(p, device)
    if reason is not None:
        return reason
    N, K = (p.K, p.N) if p.transposed else (p.N, p.K)
    columns = columns_of(p.M, N, device)
    tiles = -(-p.M // _ROWS) * -(-N // columns)
    ctas = max(1, min(tiles, device.sms))
    size = p.dtype.itemsize
    moved = (p.M * K + N * K + p.M * N) * size + p.M * p.r * wide(p.dtype).itemsize
    return Launch(
        _run(p, N, columns, WGMMA[device.capability].group, ctas),
        f"linear_expand: {ctas} CTAs for {tiles} tiles of {_ROWS} x {columns}, wgmma",
        2.0 * p.M * N * (K + p.r),
        float(moved + N * p.r * p.adapter_dtype.itemsize),
    )


def why_refused(p: Problem, device: Device) -> str | None:
    """A sentence if the kernel can't serve a ``linear_expand``, else None."""
    if device.capability not in WGMMA:
        has = ".".join(map(str, divmod(device.capability, 10)))
        return f"compute capability is {has}, the kernels of wgmma are for 9.0"
    if p.format != DENSE:
        return f"the weight is stored as {p.format}, the kernels of wgmma read a dense one"
    if p.dtype not in _DTYPES:
        return f"the dtype is {p.dtype}, the kernels of wgmma have bfloat16 and float16"
    if p.adapter_dtype not in _ADAPTERS:
        return f"the adapter is {p.adapter_dtype}, the kernels have float16, bfloat16 and float32"
    if not 1 <= p.r < _MOST_RANKS:
        return f"the rank is {p.r}, the kernels of wgmma take 1 to {_MOST_RANKS - 1}"
    N, K = (p.K, p.N) if p.transposed else (p.N, p.K)
    if K == 0:
        return "x has no columns, the kernels of wgmma need one"
    x, weight = p.layouts.dy if p.transposed else p.layouts.x, p.layouts.weight
    for name, at in (("x", x.rows), ("the weight", weight.rows or weight.columns)):
        if at < _TMA:
            return f"the rows of {name} aren't aligned to {_TMA} bytes, TMA reads those that are"
    written = Layout.fresh(p.M, N, p.dtype)
    if written.rows < _TMA and p.M > 1:
        return f"a row of y has {N * p.dtype.itemsize} bytes, TMA writes multiples of {_TMA}"
    if x.huge or weight.huge or written.huge:
        return "a matrix has no rows, too many of them or too long ones for TMA"
    return None


def columns_of(M: int, N: int, device: Device) -> int:
    """Those of a tile: the wider one reads less, the narrower one can fill the chip better."""
    table = WGMMA[device.capability]

    def takes(columns: int) -> float:
        rounds = -(-(-(-M // _ROWS) * -(-N // columns)) // device.sms)
        return rounds * columns * (table.narrow if columns == 128 else 1.0)

    return min((256, 128), key=takes)


def _run(p: Problem, N: int, columns: int, group: int, ctas: int) -> Run:
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
        mask = (seed, threshold(dropout_p), survivor_scale(dropout_p)) if masked else _NO_MASK
        torch.ops.lorafast_cuda.linear_expand_sm90.default(
            x, weight.t() if transposed else weight, s, lora_B, float(scaling), bias, *mask, y,
            counters(x, _COUNTERS), columns, group, ctas,
        )  # fmt: skip
        return y

    return run
