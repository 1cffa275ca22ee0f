"""``out = scale · Σ partials``: a reduction's second launch, where one program would take too long."""

import functools
from collections.abc import Callable

import triton
import triton.language as tl
from lorafast.kernels.common.device import cast
from lorafast.kernels.common.launch import INTERPRETED, KEPT
from lorafast.kernels.common.start import Start, key_of
from torch import Tensor

_BLOCK = 256
_AT_ONCE = 8
"""Partial sums that a program has in flight, lest it wait for memory once for each."""


@triton.jit(do_not_specialize=["count"])
def sum_partials_kernel(
    partials_ptr,
    out_ptr,
    count,
    size,
    scale,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program p adds up elements p·BLOCK and on."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in tl.range(0, count, AT_ONCE):
        parts = first + tl.arange(0, AT_ONCE)
        # 64 bits: all partials together may pass 2**31 elements.
        starts = parts.to(tl.int64)[:, None] * size
        found = tl.load(
            partials_ptr + starts + offsets[None, :],
            mask=(parts < count)[:, None] & inside[None, :],
            other=0.0,
        )  # [AT_ONCE, BLOCK]
        total += tl.sum(found, axis=0)
    total *= scale
    tl.store(out_ptr + offsets, cast(total, out_ptr.dtype.element_ty, INTERPRETED), mask=inside)


@functools.lru_cache(maxsize=KEPT)
def launcher(count: int, size: int) -> Callable[[Tensor, Tensor, float], None]:
    """What launches ``out = scale · Σᵢ partials[i]``, in an order of ``i`` that never changes, so that
    two runs give the same bits: of ``partials [count, …]``, float32, ``out […]`` and ``scale``. Both
    tensors are contiguous.
    """
    start = Start(
        sum_partials_kernel,
        (-(-size // _BLOCK),),
        {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True},
    )

    def run(partials: Tensor, out: Tensor, scale: float) -> None:
        key = key_of(tensors=(partials, out))
        start(key, partials, out, count, size, scale, _BLOCK, _AT_ONCE, INTERPRETED)

    return run
