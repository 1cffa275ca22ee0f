"""Frozen weights in the formats that a problem's ``base`` names."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lorafast.operands import DENSE, FP4, FP8, MXFP4, NF4, Int8, Operand

_E2M1_RMS = 2.93
"""Of all 16 numbers of E2M1."""
_BIAS = 127
"""Of exponents of 8 bits."""
_BLOCK = 32
"""Columns that share an exponent."""


def _mxfp4(weight: Tensor) -> Operand:
    """Random codes about as large as ``weight [N, K]`` is where its rows are of norm 1: nothing here
    rounds to this format."""
    N, K = weight.shape
    generator = torch.Generator(weight.device).manual_seed(1) if not weight.is_meta else None
    codes = torch.randint(
        256, (N, K // 2), dtype=torch.uint8, device=weight.device, generator=generator
    )
    exponent = _BIAS + round(math.log2(K**-0.5 / _E2M1_RMS))
    scales = torch.full((N, K // _BLOCK), exponent, dtype=torch.uint8, device=weight.device)
    return MXFP4(codes, scales, weight.dtype)


_MAKERS: dict[str, Callable[[Tensor], Operand]] = {
    NF4.format: NF4.of,
    FP4.format: FP4.of,
    Int8.format: Int8.with_scb,
    FP8.format: FP8.of,
    MXFP4.format: _mxfp4,
}
BASES = (DENSE, *_MAKERS)
"""What ``base`` may be: NF4 and FP4 in blocks of 64 with nested scales, int8 and fp8 by row."""


def quantized(weight: Tensor, base: str) -> Operand | None:
    """``weight [N, K]`` in a format of ``BASES``, without memory if it has none; None if dense."""
    return None if base == DENSE else _MAKERS[base](weight)


def stored_bytes(N: int, K: int, dtype: torch.dtype, base: str) -> int:
    """What W ``[N, K]`` takes: its elements, or its codes and scales."""
    operand = quantized(torch.empty((N, K), dtype=dtype, device="meta"), base)
    if operand is None:
        return N * K * dtype.itemsize
    return sum(tensor.nbytes for tensor in operand.tensors().values())


def why_not(base: str, K: int) -> str | None:
    """A sentence if no W of so many columns is in that format, or None."""
    if base == MXFP4.format and K % _BLOCK:
        return f"{base} has blocks of {_BLOCK} columns, and K is {K}"
    return None
