"""W of what it is stored in: 4-bit codes in blocks, as of QLoRA (arXiv 2305.14314) and of OCP
Microscaling Formats 1.0, and 8-bit codes."""

import torch
from torch import Tensor


def scales_of(codes: Tensor, nested: Tensor, numbers: Tensor, offset: Tensor, block: int) -> Tensor:
    """Scale b is ``numbers[codes[b]] · nested[b // block] + offset``, in float32."""
    of_block = nested.repeat_interleave(block)[: codes.numel()]
    return numbers[codes.long()] * of_block + offset


def dequantize_four_bit(
    codes: Tensor,
    scales: Tensor,
    numbers: Tensor,
    block: int,
    shape: torch.Size,
    dtype: torch.dtype,
) -> Tensor:
    """W: of its elements, row by row, number i is ``numbers[code i] · scales[i // block]``.

    ``codes``: bytes, two codes each, the first of them in the upper half. ``scales [blocks]`` and
    ``numbers [16]`` are float32, and so is the product, rounded to ``dtype``.
    """
    n = shape.numel()
    both = torch.stack((codes.reshape(-1) >> 4, codes.reshape(-1) & 15), dim=1)
    of_block = scales.repeat_interleave(block)[:n]
    return (numbers[both.reshape(-1)[:n].long()] * of_block).to(dtype).reshape(shape)


def dequantize_eight_bit(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``W = codes · scale`` in float32, rounded to ``dtype``: int8 or e4m3 ``[N, K]``, a scale as it is
    broadcast."""
    return (codes.float() * scale).to(dtype)


def dequantize_mxfp4(
    codes: Tensor, exponents: Tensor, numbers: Tensor, dtype: torch.dtype
) -> Tensor:
    """``W[n, k] = numbers[code] · 2^(exponents[n, k // 32] − 127)``, NaN where the exponent is 255.

    ``codes [N, K / 2]``: bytes, two codes each, the first of them in the lower half; ``exponents
    [N, K / 32]`` uint8; ``numbers [16]``.
    """
    both = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1)
    powers = torch.where(exponents == 255, torch.nan, 2.0 ** (exponents.double() - 127))
    return (numbers[both.long()] * powers.repeat_interleave(32, dim=1)).float().to(dtype)
