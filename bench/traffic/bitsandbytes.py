"""What operations of bitsandbytes launch on a GPU where the dispatcher sees one of them.

As in bitsandbytes 0.50: ``_dequant_linear_fallback`` of its CUDA backend, and the default of
``int8_scaled_mm``, which that backend has too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FEWEST = 1537
"""Rows of x from which its 4-bit product is always the weight made dense and cuBLAS's GEMM. With fewer a
kernel of its own may take its place, by GPU and sizes."""
_NESTED_BLOCK = 256


def composition_of(operation: Any) -> Callable[..., Any] | None:
    """What an overload is made of; None of one that is one launch, or of another library."""
    return _COMPOSITIONS.get(operation._overloadpacket._qualified_op_name)


def _gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    ops = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        nested = ops.dequantize_blockwise.default(
            absmax_8bit, absmax, absmax_code, _NESTED_BLOCK, torch.float32
        )
        absmax = nested + absmax_offset
    W = ops.dequantize_4bit.default(B, absmax, blocksize, quant_type, shapeB, A.dtype)
    return F.linear(A, W, bias)


def _int8_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    ops = torch.ops.bitsandbytes
    sums = ops.int8_linear_matmul.default(A, B)
    y: Tensor = ops.int8_mm_dequant.default(sums, row_stats, col_stats, dtype=dtype, bias=bias)
    return y


_COMPOSITIONS: dict[str, Callable[..., Any]] = {
    "bitsandbytes::gemm_4bit": _gemm_4bit,
    "bitsandbytes::int8_scaled_mm": _int8_scaled_mm,
}
