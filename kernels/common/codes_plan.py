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
    c = config or _tiles(M, dtype)
    tiles = -(-M // c.block_m) * -(-N // c.block_n)
    splits = split_k(2 * sms, tiles, -(-K // c.block_k))
    return CodesLaunch(c, M, K, N, r, tiles, splits, transposed, GROUP, precision, bias)


def _tiles(M: int, dtype: torch.dtype) -> LaunchConfig:
    if dtype.itemsize == 4:
        return LaunchConfig(16 if M <= 16 else 32, 64, 32, 16, num_warps=4, num_stages=2)
    rows = next((rows for rows in (16, 32, 64) if rows >= M), 128)
    columns = 32 if rows == 16 else 64  # more programs where there are fewest, and nothing spills
    return LaunchConfig(rows, columns, 64, 16, num_warps=4 if rows < 128 else 8, num_stages=3)
