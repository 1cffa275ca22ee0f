"""``out = scale · Σ partials``: a reduction's second launch, where one program would take too long."""

import functools
from collections.abc import Callable

import triton
import triton.language as tl
from lorafast.kernels.common.device import cast, sum_blocks
from lorafast.kernels.common.launch import INTERPRETED, KEPT
from lorafast.kernels.common.start import Start, key_of
from torch import Tensor

_BLOCK = 1024


@triton.jit(do_not_specialize=["count"])
def sum_partials_kernel(
    partials_ptr,
    out_ptr,
    count,
    size,
    scale,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program p adds up elements p·BLOCK and on."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    total = sum_blocks(partials_ptr, offsets, inside, size, count) * scale
    tl.store(out_ptr + offsets, cast(total, out_ptr.dtype.element_ty, INTERPRETED), mask=inside)


@functools.lru_cache(maxsize=KEPT)
def launcher(count: int, size: int) -> Callable[[Tensor, Tensor, float], None]:
    """What launches ``out = scale · Σᵢ partials[i]``, in order of ``i``, so that two runs give the same
    bits: of ``partials [count, …]``, float32 and contiguous, ``out […]``, contiguous, and ``scale``.
    """
    start = Start(
        sum_partials_kernel,
        (-(-size // _BLOCK),),
        {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True},
    )

    def run(partials: Tensor, out: Tensor, scale: float) -> None:
        key = key_of(tensors=(partials, out))
        start(key, partials, out, count, size, scale, _BLOCK, INTERPRETED)

    return run
