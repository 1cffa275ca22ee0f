"""The launch of a layer's forward of few rows: tiles, the cut of K, who makes ``s``."""

from dataclasses import dataclass

import torch
from lorafast.kernels.common.codes_plan import GROUP
from lorafast.kernels.common.configs import LaunchConfig, split_k

MOST_ROWS = 16
"""Rows of x, which are one block."""
MOST_RANKS = 256
"""Of more, helpers would be as many as the CTAs that they run beside."""
HELPER_STAGES = 3
_MOST_SHARES = 8
_SHARE = 2
"""Blocks of K that a helper has at least."""
_OWN = 1024
"""Elements of K, times blocks of the rank, up to which every tile makes its own ``s``: 8 steps, whose
loads come from L2. A helper's ``s`` takes five ways through L2 (a part, its count, all parts, ``s``, its
flag), 3.5 µs, and there is no longer loop to hide them behind. By this model: no GPU was asked."""


@dataclass(frozen=True)
class DecodeLaunch:
    """``y = x·Wᵀ + scaling · (x·Aᵀ)·Bᵀ + bias`` of up to 16 rows, K cut into ``splits`` shares.

    - ``shares``: the shares of K that helpers take of ``s``, 0 where each tile makes its own;
    - ``helper_k``: the columns of x in a step of that;
    - ``group``: neighbours in a row of W with one scale, 0 of a dense weight;
    - ``skinny``: the precision of ``x·Aᵀ``.
    """

    config: LaunchConfig
    M: int
    K: int
    N: int
    r: int
    tiles: int
    splits: int
    shares: int
    helper_k: int
    group: int
    precision: str
    skinny: str
    bias: bool

    @property
    def rank_blocks(self) -> int:
        """Blocks of the rank; each has helpers of its own."""
        return -(-self.r // self.config.block_r)

    @property
    def helpers(self) -> int:
        """CTAs beside those of the tiles."""
        return self.shares * self.rank_blocks

    @property
    def programs(self) -> int:
        """All CTAs."""
        return self.helpers + self.tiles * self.splits


def decode_launch(
    M: int,
    K: int,
    N: int,
    r: int,
    *,
    sms: int,
    dtype: torch.dtype,
    precision: str,
    skinny: str,
    bits: int,
    bias: bool = False,
    config: LaunchConfig | None = None,
) -> DecodeLaunch:
    """``bits``: of an element of W as it is stored.

    Tiles of few columns, so that CTAs fill the SMs; a block has 16 ranks of A, so that a helper needs no
    more shared memory than a tile."""
    c = config or _tiles(dtype, bits)
    tiles = -(-N // c.block_n)
    programs = 4 if dtype.itemsize == 2 else 2
    splits = split_k(programs * sms, tiles, -(-K // c.block_k))
    helper_k = 256 // dtype.itemsize
    blocks, rank_blocks = -(-K // helper_k), -(-r // c.block_r)
    shares = 0
    if K * rank_blocks > _OWN:
        shares = max(min(blocks // _SHARE, _MOST_SHARES), 1)
    group = GROUP if bits < 8 * dtype.itemsize else 0
    return DecodeLaunch(
        c, M, K, N, r, tiles, splits, shares, helper_k, group, precision, skinny, bias
    )


def _tiles(dtype: torch.dtype, bits: int) -> LaunchConfig:
    """In 16 bits a row of a tile has whole sectors of W, and those on their way are 6 KB of codes in 4
    bits, 12 KB in 8 bits, 32 KB dense, by each of the four programs of an SM: memory gives an H200's SM
    23 KB in the 800 ns that it takes to answer. Codes of more columns of W at once take more registers
    than four programs have, or spill: found by compiling."""
    if dtype.itemsize == 4:
        return LaunchConfig(16, 32, 32, 16, num_warps=4, num_stages=3)
    depth, stages = (128, 4) if bits < 16 else (256, 3)
    return LaunchConfig(16, 32, depth, 16, num_warps=4, num_stages=stages)
