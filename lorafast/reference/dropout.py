"""The dropout mask: a function of ``(seed, row, column)``, the same bit for bit in every backend.

Philox 4x32 with 7 rounds (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
1, 2, 3", SC 2011) makes four 32-bit words, that is eight half-words of 16 bits, from one counter.
Element ``(row, col)`` of an ``[M, K]`` matrix takes half-word ``col % 8`` of

    philox(key=seed, counter=row * ceil(K / 8) + col // 8)

where half-word ``h`` is the low (``h`` even) or high (``h`` odd) half of word ``h // 2``. The element
is dropped when its half-word is below ``round(p * 65536)``; survivors are multiplied by the
reciprocal of the keep probability so quantised.
"""

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF

ROUNDS = 7
COLUMNS_PER_CALL = 8


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    rounds: int = ROUNDS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32: four random 32-bit words from a 128-bit counter and a 64-bit key.

    All words are int64 tensors that hold unsigned 32-bit values, and broadcast against each other.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap modulo 2**64 and so keep all 64 bits of the unsigned product.
        product0 = c0 * MULTIPLIERS[0]
        product1 = c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _LOW) ^ c1 ^ k0,
            product1 & _LOW,
            ((product0 >> 32) & _LOW) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0 = (k0 + WEYL[0]) & _LOW
        k1 = (k1 + WEYL[1]) & _LOW
    return c0, c1, c2, c3


def threshold(dropout_p: float) -> int:
    """Half-words below this are dropped: ``round(p * 65536)``."""
    return round(dropout_p * 65536)


def survivor_scale(dropout_p: float) -> float:
    """``1 / keep``, with ``keep = 1 - threshold(p) / 65536``; 0 if everything is dropped."""
    kept = 65536 - threshold(dropout_p)
    return 65536 / kept if kept else 0.0


def keep_mask(M: int, K: int, dropout_p: float, seed: Tensor) -> Tensor:
    """The boolean mask ``[M, K]``: true where an element survives.

    ``seed`` is an int64 tensor of one element; its 64 bits are the Philox key.
    """
    groups = -(-K // COLUMNS_PER_CALL)
    index = torch.arange(M * groups, device=seed.device).view(M, groups)
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    seed = seed.reshape(())
    words = philox_4x32(
        (index & _LOW, index >> 32, zero, zero),
        (seed & _LOW, (seed >> 32) & _LOW),
    )
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    keep = torch.stack(halves, dim=-1) >= threshold(dropout_p)  # [M, groups, 8]
    return keep.view(M, groups * COLUMNS_PER_CALL)[:, :K]


def dropout(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """``keep_mask * x / keep`` for ``x`` of shape ``[M, K]``; ``x`` itself if there is no dropout.

    The mask is its own adjoint: applied to a gradient, this is also dropout's backward.
    """
    if dropout_p == 0.0 or seed is None:
        return x
    M, K = x.shape
    keep = keep_mask(M, K, dropout_p, seed)
    return torch.where(keep, x * survivor_scale(dropout_p), 0.0)
