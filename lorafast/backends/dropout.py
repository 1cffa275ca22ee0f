"""Dropout in PyTorch's own calls: the bits of ``lorafast.reference.dropout``, with few temporaries.

It serves backends whose kernels make no mask themselves. Where a kernel makes a bit mask
(``make_bits_by``), its bits are read; elsewhere Philox is computed in PyTorch's integer operations.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lorafast.core.problem import PLAIN
from lorafast.reference.dropout import (
    COLUMNS_PER_CALL,
    MULTIPLIERS,
    ROUNDS,
    WEYL,
    survivor_scale,
    threshold,
)

_LOW = 0xFFFFFFFF
_BITS = 8

Bits = Callable[[Tensor, int, int, int], Tensor]
"""``seed, threshold, M, K`` → uint8 ``[M, ceil(K / 8)]``: bit j of byte (row, group) says whether column
8 · group + j of the row is kept. ``seed`` is an int64 tensor of one element."""

_makers: dict[str, Callable[[torch.device], Bits | None]] = {}


def make_bits_by(device_type: str, maker: Callable[[torch.device], Bits | None]) -> None:
    """Lets ``maker`` make the masks on devices of this type: it gives what makes them there, None where
    it can't. It is asked in every call."""
    _makers[device_type] = maker


def bits_on(device: torch.device) -> Bits | None:
    """What makes bit masks on ``device`` in one launch, None if nothing does."""
    maker = _makers.get(device.type)
    return None if maker is None else maker(device)


def dropout(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """``keep_mask * x / keep``; ``x`` itself if there is no dropout."""
    if not dropout_p or seed is None:
        return x
    M, K = x.shape
    keep = keep_mask(M, K, dropout_p, seed)
    return torch.where(keep, x, 0.0).mul_(survivor_scale(dropout_p))


def keep_mask(M: int, K: int, dropout_p: float, seed: Tensor) -> Tensor:
    """The boolean mask ``[M, K]`` of ``lorafast.reference.keep_mask``, two to three times as fast."""
    bits = bits_on(seed.device) if type(seed) in PLAIN else None
    if bits is not None:
        return _unpacked(bits(seed, threshold(dropout_p), M, K), K)
    groups = -(-K // COLUMNS_PER_CALL)
    index = torch.arange(M * groups, device=seed.device)
    keep = torch.empty((M * groups, COLUMNS_PER_CALL), dtype=torch.bool, device=seed.device)
    dropped_below = threshold(dropout_p)
    for i, word in enumerate(_philox(index, seed.reshape(()))):
        torch.ge(word & 0xFFFF, dropped_below, out=keep[:, 2 * i])
        torch.ge(word >> 16, dropped_below, out=keep[:, 2 * i + 1])
    return keep.view(M, groups * COLUMNS_PER_CALL)[:, :K]


def _unpacked(bits: Tensor, K: int) -> Tensor:
    """The boolean mask ``[M, K]`` of a bit mask."""
    # A constant from the host would be copied, which a captured graph can't.
    shifts = torch.arange(_BITS, dtype=torch.uint8, device=bits.device)
    keep = torch.bitwise_right_shift(bits.unsqueeze(-1), shifts).bitwise_and_(1)
    return keep.view(torch.bool).view(bits.shape[0], bits.shape[1] * _BITS)[:, :K]


def _philox(index: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    """The four words for counter ``index`` and key ``seed``; see ``reference.philox_4x32``."""
    c0, c1 = index & _LOW, index >> 32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    product0, product1 = torch.empty_like(c0), torch.empty_like(c0)
    for _ in range(ROUNDS):
        torch.mul(c0, MULTIPLIERS[0], out=product0)
        torch.mul(c2, MULTIPLIERS[1], out=product1)
        torch.bitwise_right_shift(product1, 32, out=c0)
        c0.bitwise_and_(_LOW).bitwise_xor_(c1).bitwise_xor_(k0)
        torch.bitwise_right_shift(product0, 32, out=c2)
        c2.bitwise_and_(_LOW).bitwise_xor_(c3).bitwise_xor_(k1)
        torch.bitwise_and(product1, _LOW, out=c1)
        torch.bitwise_and(product0, _LOW, out=c3)
        k0, k1 = (k0 + WEYL[0]) & _LOW, (k1 + WEYL[1]) & _LOW
    return c0, c1, c2, c3
