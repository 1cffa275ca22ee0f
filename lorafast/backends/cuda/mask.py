"""The dropout mask by itself, one bit an element: for operations that have no kernel with a mask."""

import torch
from torch import Tensor

from lorafast.reference.dropout import COLUMNS_PER_CALL


def mask(seed: Tensor, threshold: int, M: int, K: int) -> Tensor:
    """Which elements of an ``[M, K]`` matrix survive dropout: ``bits [M, ceil(K / 8)]`` of uint8.

    Element ``(row, col)`` survives if bit ``col % 8`` (the least significant is 0) of
    ``bits[row, col // 8]`` is 1. Bits beyond column K are 0. ``seed`` is an int64 tensor of one element
    on a CUDA device, ``threshold`` that of ``lorafast.reference.dropout``, 0 to 65536. One launch on the
    current stream, of compute capability 7.5 or newer.
    """
    bits = torch.empty((M, -(-K // COLUMNS_PER_CALL)), dtype=torch.uint8, device=seed.device)
    torch.ops.lorafast_cuda.mask.default(seed, threshold, K, bits)
    return bits
