"""What the kernels of a frozen layer with a vector are launched with."""

from dataclasses import dataclass, replace

import torch
from lorafast.kernels.common.configs import LaunchConfig, chunks
from lorafast.kernels.common.plan import LinearExpandLaunch, linear_expand_launch, with_room

_PASS = LaunchConfig(16, 256, 16, 16, 4, 3, ctas_per_sm=8)
"""Four warps, each a row of 16-byte loads at a time, and as many of them as hide a load. Not tuned."""
_FEW_COLUMNS = 64
_FLOAT32_BYTES, _LEAST_BLOCK = 4, 16


@dataclass(frozen=True)
class ScaledGemmLaunch:
    """A GEMM whose result or first operand a vector scales.

    - ``gemm``: that of a ``linear_expand`` without ranks;
    - ``at_load``: the vector scales x, tile by tile, else what is written;
    - ``writes``: whether y is written; ``keeps``: whether z is, which is y before it is scaled;
    - ``sums``: whether the sums of z and another matrix over the rows of a tile are.
    """

    gemm: LinearExpandLaunch
    at_load: bool
    writes: bool
    keeps: bool
    sums: bool

    @property
    def row_blocks(self) -> int:
        """How many partial sums there are for a column."""
        return -(-self.gemm.M // self.gemm.config.block_m)


@dataclass(frozen=True)
class ScaledPassLaunch:
    """A pass over g ``[M, N]``, and where sums are asked for over another matrix: ``grid`` has column
    blocks and row groups of ``m_blocks`` blocks of M."""

    config: LaunchConfig
    M: int
    N: int
    grid: tuple[int, int]
    m_blocks: int
    writes: bool
    sums: bool


@dataclass(frozen=True)
class ScaledLinearLaunch:
    """A layer's forward or backward: a GEMM of ours or, where ``gemm`` is None and one is needed,
    PyTorch's; and a pass, or none."""

    gemm: ScaledGemmLaunch | None
    rows: ScaledPassLaunch | None


def scaled_gemm_launch(
    c: LaunchConfig,
    M: int,
    K: int,
    N: int,
    *,
    sms: int,
    dtype: torch.dtype,
    precision: str,
    tma: bool,
    transposed: bool = False,
    by_rows: bool = True,
    bias: bool = False,
    at_load: bool = False,
    writes: bool = True,
    keeps: bool = False,
    sums: bool = False,
) -> ScaledGemmLaunch:
    """As ``linear_expand_launch`` without ranks, of sizes of the GEMM.

    A tile whose sums are taken has the size and the parts of one with a mask. Where a vector multiplies
    float32 at its load, tiles have half the columns. Both would spill otherwise: found by compiling.
    """
    if sums:
        c = with_room(c)
    if at_load and dtype.itemsize == _FLOAT32_BYTES:
        c = replace(c, block_n=max(c.block_n // 2, _LEAST_BLOCK * c.parts))
    gemm = linear_expand_launch(
        c, M, K, N, 0, sms=sms, dtype=dtype, precision=precision, tma=tma, transposed=transposed,
        by_rows=by_rows, bias=bias,
    )  # fmt: skip
    if sums:
        gemm = replace(gemm, parts=max(gemm.parts, c.masked_parts))
    return ScaledGemmLaunch(gemm, at_load, writes, keeps, sums)


def scaled_pass_launch(
    M: int, N: int, *, sms: int, writes: bool = True, sums: bool = True
) -> ScaledPassLaunch:
    """A CTA for each column block and row group."""
    c = _PASS if N > _FEW_COLUMNS else replace(_PASS, block_m=64, block_n=64)
    col_blocks = -(-N // c.block_n)
    groups, m_blocks = chunks(sms * c.ctas_per_sm, M, c.block_m, max(col_blocks, 1))
    return ScaledPassLaunch(c, M, N, (col_blocks, groups), m_blocks, writes, sums)
