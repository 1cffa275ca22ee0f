"""The second level of every reduction: ``out = scale · Σ partials``."""

import torch
import triton
import triton.language as tl
from lorafast.kernels.common.device import cast
from lorafast.kernels.common.launch import INTERPRETED
from torch import Tensor

_BLOCK = 1024


@triton.jit(do_not_specialize=["count", "size"])
def _sum_partials_kernel(
    partials_ptr,
    out_ptr,
    count,
    size,
    scale,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(count):
        # 64 bits: all partials together may pass 2**31 elements.
        start = tl.cast(i, tl.int64) * size
        total += tl.load(partials_ptr + start + offsets, mask=inside, other=0.0)
    total = cast(total * scale, out_ptr.dtype.element_ty, INTERPRETED)
    tl.store(out_ptr + offsets, total, mask=inside)


def sum_partials(partials: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """``scale · Σᵢ partials[i]``, in order of ``i``, so that two runs give the same bits.

    Shapes: ``partials [P, a, b]`` float32, contiguous → ``[a, b]`` in ``dtype``.
    """
    out = torch.empty(partials.shape[1:], device=partials.device, dtype=dtype)
    size = out.numel()
    _sum_partials_kernel[(triton.cdiv(size, _BLOCK),)](
        partials,
        out,
        partials.shape[0],
        size,
        float(scale),
        BLOCK=_BLOCK,
        INTERPRETED=INTERPRETED,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out
