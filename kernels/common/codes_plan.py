"""The launch of a product that reads W as codes: tiles, the cut of K, whether it can serve a weight."""

from dataclasses import dataclass

import torch
from lorafast.kernels.common.configs import LaunchConfig, split_k

GROUP = 32
"""Neighbours in a row that have one scale."""
MOST_ROWS = 256
"""Beyond them W is made dense, whatever a model says."""


@dataclass(frozen=True)
class CodesLaunch:
    """``[M, K] · [K, N]`` with its low-rank term, K cut into ``splits`` shares.

    ``transposed``: by W, not by its transpose; ``group``: neighbours in a row of W with one scale.
    """

    config: LaunchConfig
    M: int
    K: int
    N: int
    r: int
    tiles: int
    splits: int
    transposed: bool
    group: int
    precision: str
    bias: bool

    @property
    def folds(self) -> bool:
        """Whether scales of rows of W are better multiplied into dy than into W: a tile of dy has few
        rows beside W's columns. Executed at M = 64, as many cost more instructions than they save."""
        return 4 * self.config.block_m <= self.config.block_n

    @property
    def row_blocks(self) -> int:
        """How often W's numbers are made."""
        return -(-self.M // self.config.block_m)


def codes_launch(
    M: int,
    K: int,
    N: int,
    r: int,
    *,
    sms: int,
    dtype: torch.dtype,
    precision: str,
    transposed: bool = False,
    bias: bool = False,
    config: LaunchConfig | None = None,
) -> CodesLaunch:
    """Tiles by the rows: few rows leave time to make numbers, not to multiply."""
    c = config or _tiles(M, dtype, transposed)
    tiles = -(-M // c.block_m) * -(-N // c.block_n)
    # Of an SM: partial sums grow with M.
    programs = 4 if c.block_m == 16 and dtype.itemsize == 2 else 2
    splits = split_k(programs * sms, tiles, -(-K // c.block_k))
    return CodesLaunch(c, M, K, N, r, tiles, splits, transposed, GROUP, precision, bias)


def _tiles(M: int, dtype: torch.dtype, transposed: bool) -> LaunchConfig:
    """A row of a tile of W has whole sectors of codes, and there are enough of them on their way: of two
    tiles ahead 8 KB in 4 bits, by each of the programs of an SM. Memory gives an H200's SM 23 KB in the
    800 ns that it takes to answer."""
    if dtype.itemsize == 4:
        return LaunchConfig(16 if M <= 16 else 32, 64, 32, 16, num_warps=4, num_stages=2)
    rows = next((rows for rows in (16, 32, 64) if rows >= M), 128)
    if rows == 128:
        return LaunchConfig(128, 64, 64, 16, num_warps=8, num_stages=3)
    columns, depth = (32, 256) if rows == 16 and not transposed else (64, 128)
    return LaunchConfig(rows, columns, depth, 16, num_warps=4, num_stages=3)


def scales_apart(block: tuple[int, int], stored: str, dtype: torch.dtype) -> bool:
    """Whether a product in ``dtype`` leaves the scales of W out of its main loop.

    They must be of rows or of all of W, ``block``'s columns 0. W isn't rounded then, which the contract
    allows where W is rounded to ``dtype``, be it in two steps. float16 has too short a range: dy times a
    scale may be 0 in it.
    """
    name = str(dtype).removeprefix("torch.")
    return block[1] == 0 and name != "float16" and stored in (name, "float32")
