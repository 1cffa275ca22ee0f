"""What PyTorch's own calls take on a GPU: a model of ``operations``, call by call.

cuBLAS is the yardstick of GEMMs. What its skinny ones reach, and what a mask takes, was measured on an
H100 and an H200 (M = 8192, K = N = 4096, r = 16 to 128); that both reach less where rows are not aligned
is assumed.
"""

import torch

from lorafast.backends.cost import (
    CALL_SECONDS,
    FLOAT32,
    Device,
    Estimate,
    alignment,
    base_gemm,
    gemm_rate,
    work,
)
from lorafast.backends.dropout import bits_on
from lorafast.core.dtypes import wide
from lorafast.core.problem import LAYER_OPERATIONS, WEIGHT_NORM, Layout, Problem, parts

_SKINNY = 0.72
"""Of the bandwidth, for a GEMM of 16-bit elements that is as thin as the rank, and for copies."""
_SKINNY_WIDE = 0.6
"""The same for wider elements."""
_MASK_LAUNCHES, _MASK_BYTES = 138, 225
"""Launches of a dropout mask, and bytes that they move per element: counted."""
_BIT_MASK_LAUNCHES, _BIT_MASK_BYTES = 6, 12.8
"""The same where a kernel makes the bits: counted, and 0.7 for the kernel's arithmetic, which is that of
the other kernels that make a mask."""
_NORM_LAUNCHES = 10
"""Launches of DoRA's norm beside those that read W: counted."""
_FLOAT32_BYTES = 4


def estimate(problem: Problem, device: Device) -> Estimate:
    """What the problem takes on ``device``."""
    if problem.operation in LAYER_OPERATIONS:
        found = sum((estimate(part, device) for part in parts(problem)), Estimate())
        if "dweight" in problem.wants:
            found += base_gemm(problem._replace(transposed=True), device, accumulated=False)
        return found
    return _OPERATIONS[problem.operation](problem, device)


def _shrink(p: Problem, device: Device) -> Estimate:
    x, s, A = p.M * p.K, p.M * p.r, p.r * p.K
    found = _widened(p, x, device) + _mask(p, p.K, device) + _cast(p, A, device)
    return found + _skinny(p, x, s + A, p.layouts.x, device)


def _shrink_backward(p: Problem, device: Device) -> Estimate:
    x, ds, dA = p.M * p.K, p.M * p.r, p.r * p.K
    found = _widened(p, x, device) + _mask(p, p.K, device)
    return found + _skinny(p, x, ds + dA, p.layouts.x, device) + _cast(p, dA, device)


def _expand_backward(p: Problem, device: Device) -> Estimate:
    """dy once for each result."""
    dy, of_s, of_B = p.M * p.N, p.M * p.r, p.N * p.r
    found = Estimate()
    if "ds" in p.wants or "dB" in p.wants:
        found += _widened(p, dy, device)
    for name in ("ds", "dB"):
        if name in p.wants:
            found += _cast(p, of_B, device) + _skinny(p, dy, of_s + of_B, p.layouts.dy, device)
    if "dbias" in p.wants:
        found += work(device, moved=dy * p.dtype.itemsize, share=_SKINNY)
    return found


def _expand(p: Problem, device: Device) -> Estimate:
    return _low_rank(p, p.N, device) + _widened(p, p.M * p.N, device)


def _linear_expand(p: Problem, device: Device) -> Estimate:
    """The low-rank term first; reading that back hides behind the GEMM."""
    columns = p.K if p.transposed else p.N
    y, size = p.M * columns, wide(p.dtype).itemsize
    found = _low_rank(p, columns, device) + base_gemm(p, device)
    if wide(p.dtype) is not p.dtype:  # added in float32
        found += work(device, moved=y * (2 * size + p.dtype.itemsize), share=_SKINNY)
    return found + _widened(p, y, device)


def _low_rank(p: Problem, columns: int, device: Device) -> Estimate:
    """``drop(scaling · s·Bᵀ)`` in the dtype of ``s``."""
    y, of_s, factor = p.M * columns, p.M * p.r, p.r * columns
    low = work(
        device,
        flops=2.0 * p.r * y,
        rate=gemm_rate(p, device),
        moved=(y + of_s + factor) * wide(p.dtype).itemsize,
        share=_SKINNY,
    )
    return _cast(p, factor, device) + low + _mask(p, columns, device)


def _weight_norm(p: Problem, device: Device) -> Estimate:
    """W in float32, for its norm and its product with A; the rest is as small as A and B."""
    W, size, low = p.N * p.K, p.dtype.itemsize, (p.N + p.K) * p.r
    found = work(device, launches=_NORM_LAUNCHES)
    if size < _FLOAT32_BYTES:
        found += work(device, moved=W * (size + _FLOAT32_BYTES), share=_SKINNY)
    found += work(device, moved=W * _FLOAT32_BYTES, share=_SKINNY)
    rate = device.rate(torch.float32, p.tf32) * FLOAT32
    return found + work(
        device, flops=2.0 * p.r * W, rate=rate, moved=(W + low) * _FLOAT32_BYTES, share=_SKINNY_WIDE
    )


def _bottleneck(p: Problem, device: Device) -> Estimate:
    """h for the first product, the residual copied into y, y read and written by the second one."""
    size, of_a = wide(p.dtype).itemsize, p.M * p.r
    h, y = p.M * p.K, p.M * p.N
    found = _widened(p, h + y, device) + _cast(p, p.r * (p.K + p.N), device)
    found += _skinny(p, h, of_a + p.r * p.K, p.layouts.x, device)
    found += work(device, moved=2 * of_a * size, share=_SKINNY)
    found += work(device, moved=2 * y * size, share=_SKINNY)
    onto = p.layouts.residual if p.residual else p.layouts.x
    return found + _skinny(p, y, y + of_a + p.r * p.N, onto, device)


def _bottleneck_backward(p: Problem, device: Device) -> Estimate:
    """dy once for each result that is made of it, and the activations between."""
    size, of_a = wide(p.dtype).itemsize, p.M * p.r
    h, dy, layout = p.M * p.K, p.M * p.N, p.layouts.dy
    found = _widened(p, dy, device)
    if {"dh", "dD", "dd"} & {*p.wants}:
        found += _skinny(p, dy, of_a + p.r * p.N, layout, device)
        found += work(device, moved=3 * of_a * size, share=_SKINNY)
    if "dU" in p.wants:
        found += work(device, moved=2 * of_a * size, share=_SKINNY)
        found += _skinny(p, dy, of_a + p.r * p.N, layout, device) + _cast(p, p.r * p.N, device)
    if "du" in p.wants:
        found += work(device, moved=dy * size, share=_SKINNY)
    if "dD" in p.wants:
        found += _widened(p, h, device) + _cast(p, p.r * p.K, device)
        found += _skinny(p, h, of_a + p.r * p.K, p.layouts.x, device)
    if "dh" in p.wants:
        if not p.residual:
            found += work(device, moved=2 * dy * size, share=_SKINNY)
        onto = 0 if p.residual else h
        found += _skinny(p, h, onto + of_a + p.r * p.K, layout, device) + _widened(p, h, device)
    if "dd" in p.wants:
        found += work(device, moved=of_a * size, share=_SKINNY)
    return found


def _scaled_linear(p: Problem, device: Device) -> Estimate:
    """The GEMM, and a pass that reads and writes what is scaled."""
    scaled = p.M * (p.K if p.scales_input else p.N)
    found = base_gemm(p, device, accumulated=False)
    return found + work(device, moved=2 * scaled * p.dtype.itemsize, share=_SKINNY)


def _scaled_linear_backward(p: Problem, device: Device) -> Estimate:
    """The same, and for the sum two matrices read, their product in float32 written and read."""
    size, found = p.dtype.itemsize, Estimate()
    scaled = p.M * (p.K if p.scales_input else p.N)
    if "dx" in p.wants or p.scales_input:
        found += base_gemm(p, device, accumulated=False)
    if "dx" in p.wants:
        found += work(device, moved=2 * scaled * size, share=_SKINNY)
    if "dscale" in p.wants:
        wide_size = max(size, _FLOAT32_BYTES)
        found += work(device, moved=scaled * (2 * size + 2 * wide_size), share=_SKINNY, launches=2)
    return found


_OPERATIONS = {
    "bottleneck": _bottleneck,
    "bottleneck_backward": _bottleneck_backward,
    "shrink": _shrink,
    "expand": _expand,
    "linear_expand": _linear_expand,
    "expand_backward": _expand_backward,
    "shrink_backward": _shrink_backward,
    WEIGHT_NORM: _weight_norm,
    "scaled_linear": _scaled_linear,
    "scaled_linear_backward": _scaled_linear_backward,
}


def _skinny(p: Problem, large: int, small: int, layout: Layout, device: Device) -> Estimate:
    """A GEMM that reads a matrix of ``large`` elements once, and ``small`` ones beside it."""
    size = wide(p.dtype).itemsize
    aligned = alignment(layout) if size == p.dtype.itemsize else 1.0
    share = aligned * (_SKINNY if size == 2 else _SKINNY_WIDE)
    rate = device.rate(wide(p.dtype), p.tf32) * (1.0 if size == 2 else FLOAT32)
    return work(
        device,
        flops=2.0 * p.r * large,
        rate=rate * aligned,
        moved=(large + small) * size,
        share=share,
    )


def _widened(p: Problem, elements: int, device: Device) -> Estimate:
    """A copy into the dtype of the low-rank term, or out of it."""
    low = wide(p.dtype)
    if low is p.dtype:
        return Estimate()
    return work(device, moved=elements * (p.dtype.itemsize + low.itemsize), share=_SKINNY)


def _cast(p: Problem, elements: int, device: Device) -> Estimate:
    """A copy of A or B, or of their gradient, where adapters have a dtype of their own."""
    low = wide(p.dtype)
    if p.adapter_dtype is low:
        return Estimate()
    return work(device, moved=elements * (p.adapter_dtype.itemsize + low.itemsize), share=_SKINNY)


def _mask(p: Problem, columns: int, device: Device) -> Estimate:
    if not p.dropout:
        return Estimate()
    launches, of_element = _MASK_LAUNCHES, float(_MASK_BYTES)
    if bits_on(p.device) is not None:
        launches, of_element = _BIT_MASK_LAUNCHES, _BIT_MASK_BYTES
    return work(device, moved=p.M * columns * of_element, launches=launches, host=CALL_SECONDS)
