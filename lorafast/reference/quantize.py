"""What a weight is stored as: 4-bit codes in blocks, as of QLoRA (arXiv 2305.14314), and 8-bit codes.

Bits are those of bitsandbytes' definition: a whole block is multiplied by the reciprocal of its greatest
magnitude, a short last one is divided by it.
"""

import torch
from torch import Tensor

_LEAST = 1e-38
"""What a block of zeros is divided by."""


def quantize_four_bit(weight: Tensor, numbers: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes and scales: of each block of elements, row by row, the greatest magnitude is its scale, and
    the code of an element the index of the number nearest to what is left, of two the lesser's.

    ``numbers [16]`` float32 → codes ``[⌈N·K / 2⌉]`` uint8, two each, the first of them in the upper
    half, and ``[blocks]`` float32.
    """
    codes, scales = nearest_in_blocks(weight, numbers, block)
    if codes.numel() % 2:  # what is left over stands for 0
        codes = torch.cat((codes, nearest(codes.new_zeros(1).float(), numbers)))
    both = codes.to(torch.uint8)
    return both[::2] << 4 | both[1::2], scales


def quantize_scales(scales: Tensor, numbers: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and offset of nested scales: their mean is taken off, ``numbers [256]`` are nearest.

    ``[blocks]`` float32 → uint8, ``[⌈blocks / block⌉]`` float32, one float32.
    """
    offset = scales.mean()
    codes, nested = nearest_in_blocks(scales - offset, numbers, block)
    return codes.to(torch.uint8), nested, offset


def quantize_eight_bit(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """int8 or e4m3 codes ``[N, K]`` and a float32 scale each row: its greatest magnitude becomes the
    greatest code."""
    integers = dtype is torch.int8
    most = 127.0 if integers else torch.finfo(dtype).max
    scale = (weight.float().abs().amax(1) / most).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (weight.float() / scale[:, None]).clamp(-most, most)
    return (codes.round() if integers else codes).to(dtype), scale


def nearest_in_blocks(values: Tensor, numbers: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The index of the number nearest to each value over its block's greatest magnitude, and that of
    each block, float32."""
    codes, scales = [], []
    for part in values.float().reshape(-1).split(block):
        greatest = part.abs().amax()
        divisor = greatest.clamp(min=_LEAST)
        left = part * (1.0 / divisor) if part.numel() == block else part / divisor
        codes.append(nearest(left, numbers))
        scales.append(greatest if part.numel() == block else divisor)
    return torch.cat(codes), torch.stack(scales)


def nearest(values: Tensor, numbers: Tensor) -> Tensor:
    """The index of the number that each value is nearest to; of two that of the lesser."""
    order = numbers.argsort()
    middles = (numbers[order][1:] + numbers[order][:-1]) / 2
    return order[(values[:, None] > middles).sum(1)]
