"""What each kernel is launched with, from the sizes of a call and a configuration: pure arithmetic.

A launch says everything but its tensors: grid, shares of a reduction, TMA or pointers, helpers. Numbers
depend on it in their last bits, since it says how sums are cut: on the bucket of M, on the number of SMs
and on the tables. So a row's result may differ between batches of different sizes (the kernels are not
batch-invariant), and never between two runs of one call.

``kernels/lora_linear`` says what helpers do.
"""

from dataclasses import dataclass, replace

import torch
from lorafast.kernels.common.configs import (
    UNROLLED_RANK_BLOCKS,
    LaunchConfig,
    chunks,
    split_k,
)

from lorafast.core.problem import Layout
from lorafast.reference import wide

_FLOPS_PER_BYTE = 97
"""What an SM multiplies while a helper streams one byte: on sm_90 3,400 operations a clock, and 35 bytes
beside the GEMM; elsewhere of the same order."""


_TWO_LOADS = 16
"""Elements: two loads of 16 bytes a thread, in 16 bits."""
_MOST_BESIDE_DBIAS = 16
"""Elements of dB a thread, beside which dbias is added up without spilling."""


@dataclass(frozen=True)
class ShrinkLaunch:
    """``grid``: row blocks, shares of K, rank blocks; a share has ``k_blocks`` blocks of K."""

    config: LaunchConfig
    M: int
    K: int
    r: int
    grid: tuple[int, int, int]
    k_blocks: int
    precision: str
    dropout: bool

    @property
    def split(self) -> bool:
        """Whether partial sums are left and added up by whoever comes last."""
        return self.grid[1] > 1


@dataclass(frozen=True)
class ExpandLaunch:
    """``grid``: column blocks, row groups; a row group has ``m_blocks`` blocks of M.

    - ``rank_blocks``: one is kept while a program goes through its rows, several are looped over;
    - ``even``: whether the last one is full; ``bias``: whether one is added.
    """

    config: LaunchConfig
    M: int
    N: int
    r: int
    grid: tuple[int, int]
    m_blocks: int
    rank_blocks: int
    even: bool
    precision: str
    bias: bool
    dropout: bool


@dataclass(frozen=True)
class LinearExpandLaunch:
    """A GEMM ``[M, K] · [K, N]`` with its low-rank term, by ``programs`` that take tiles in turn.

    - ``splits``: shares of K; ``parts``: a tile is written in so many;
    - ``tma``: by tensor descriptors, else by pointers;
    - ``transposed``: it multiplies by the weight, not by its transpose;
    - ``n_major``: TMA reads the second matrix as ``[K, N]``, which is how it lies in memory;
    - ``rank_blocks``: those of the rank that are unrolled, 0 where they are looped over.
    """

    config: LaunchConfig
    M: int
    K: int
    N: int
    r: int
    tiles: int
    splits: int
    programs: int
    tma: bool
    flatten: bool
    warp_specialize: bool
    rank_blocks: int
    parts: int
    transposed: bool
    n_major: bool
    precision: str
    bias: bool
    dropout: bool


@dataclass(frozen=True)
class ExpandBackwardLaunch:
    """``grid``: column groups, row groups, rank blocks; a row group has ``m_blocks`` blocks of M."""

    config: LaunchConfig
    M: int
    N: int
    r: int
    grid: tuple[int, int, int]
    m_blocks: int
    precision: str
    wants: tuple[str, ...]


@dataclass(frozen=True)
class ShrinkBackwardLaunch:
    """``grid``: column blocks, shares of M, rank blocks; a share has ``m_blocks`` blocks of M."""

    config: LaunchConfig
    M: int
    K: int
    r: int
    grid: tuple[int, int, int]
    m_blocks: int
    precision: str
    dropout: bool

    @property
    def split(self) -> bool:
        """Whether partial sums are left and added up by whoever comes last."""
        return self.grid[1] > 1


@dataclass(frozen=True)
class Helpers:
    """``helpers`` of ``programs`` do skinny work and miss ``waves`` rounds of tiles meanwhile.

    ``rounds``: those that the launch takes; ``alone``: that it would take without.
    """

    helpers: int
    waves: int
    programs: int
    rounds: int = 1
    alone: int = 1


@dataclass(frozen=True)
class LoraLinearLaunch:
    """The GEMM of y, beside which helpers shrink as ``shrink`` says."""

    gemm: LinearExpandLaunch
    helpers: Helpers
    shrink: LaunchConfig


def shrink_launch(
    c: LaunchConfig, M: int, K: int, r: int, *, sms: int, precision: str, dropout: bool
) -> ShrinkLaunch:
    """Cuts K so that few rows keep all SMs busy."""
    row_blocks, rank_blocks = _blocks(M, c.block_m), _blocks(r, c.block_r)
    count, k_blocks = chunks(sms * c.ctas_per_sm, K, c.block_k, row_blocks * rank_blocks)
    return ShrinkLaunch(c, M, K, r, (row_blocks, count, rank_blocks), k_blocks, precision, dropout)


def expand_launch(
    c: LaunchConfig,
    M: int,
    N: int,
    r: int,
    *,
    sms: int,
    dtype: torch.dtype,
    precision: str,
    bias: bool = False,
    dropout: bool = False,
) -> ExpandLaunch:
    """As many programs as run at once, of row groups of one length. For float16 the factors are
    float32, of which y would show TF32's rounding: each is the sum of two numbers in TF32."""
    cols, row_blocks = _blocks(N, c.block_n), _blocks(M, c.block_m)
    groups = min(max(sms * c.ctas_per_sm // max(cols, 1), 1), max(row_blocks, 1))
    m_blocks = max(_blocks(row_blocks, groups), 1)
    grid = cols, _blocks(row_blocks, m_blocks)
    if dtype is torch.float16:
        precision = "tf32x3"
    rank_blocks, even = _blocks(r, c.block_r), r % c.block_r == 0
    return ExpandLaunch(c, M, N, r, grid, m_blocks, rank_blocks, even, precision, bias, dropout)


def linear_expand_launch(
    c: LaunchConfig,
    M: int,
    K: int,
    N: int,
    r: int,
    *,
    sms: int,
    dtype: torch.dtype,
    precision: str,
    tma: bool,
    transposed: bool = False,
    by_rows: bool = True,
    bias: bool = False,
    dropout: bool = False,
    helpers: "Helpers | None" = None,
) -> LinearExpandLaunch:
    """``tma``: whether TMA can read and write the operands; ``c`` says whether it should. ``by_rows``:
    whether a row of the weight ``[N, K]``, or transposed ``[K, N]``, has neighbours in memory.

    Beside helpers K is not cut: their programs are counted in.
    """
    tiles = _blocks(M, c.block_m) * _blocks(N, c.block_n)
    if helpers is None:
        splits = split_k(sms, tiles, _blocks(K, c.block_k))
        programs = min(tiles * splits, sms * c.ctas_per_sm)
    else:
        splits, programs = 1, helpers.programs
    described = c.descriptors and tma
    # With pointers those of two tiles are too many registers; a split has too much after its main loop.
    flatten = described and c.flatten and splits == 1
    unrolled = UNROLLED_RANK_BLOCKS if flatten else 1
    if dtype is torch.float16:
        # In float32 several blocks at once don't fit in shared memory.
        unrolled = 0 if dropout else 1
    rank_blocks = _blocks(r, c.block_r)
    return LinearExpandLaunch(
        c, M, K, N, r, tiles, splits, programs, described, flatten,
        warp_specialize=described and c.warp_specialize and unrolled > 0,
        rank_blocks=rank_blocks if rank_blocks <= unrolled else 0,
        parts=c.masked_parts if dropout else c.parts,
        transposed=transposed, n_major=described and by_rows is transposed,
        precision=precision, bias=bias, dropout=dropout,
    )  # fmt: skip


def expand_backward_launch(
    c: LaunchConfig,
    M: int,
    N: int,
    r: int,
    *,
    sms: int,
    precision: str,
    wants: tuple[str, ...] = ("ds", "dB"),
) -> ExpandBackwardLaunch:
    """A program for each column group and row group."""
    c = _fitting(c, wants)
    # dbias has no rank: it takes one block where there is none, and no more, which would read dy again.
    ranks = max(r, 1) if {"ds", "dB"} & set(wants) else 1
    col_groups, rank_blocks = _blocks(N, c.block_n), _blocks(ranks, c.block_r)
    row_groups, m_blocks = chunks(
        sms * c.ctas_per_sm, M, c.block_m, max(col_groups * rank_blocks, 1)
    )
    grid = (col_groups, row_groups, rank_blocks)
    return ExpandBackwardLaunch(c, M, N, r, grid, m_blocks, precision, wants)


def _fitting(c: LaunchConfig, wants: tuple[str, ...]) -> LaunchConfig:
    """Smaller tiles where registers would spill: found by compiling.

    Half as many columns, which without ds costs nothing, for there are no partial sums of it to grow;
    half as many ranks where a thread would be left less than 16 bytes of dy.
    """
    threads = 32 * c.num_warps
    beside_dbias = "dbias" in wants and c.block_r * c.block_n // threads > _MOST_BESIDE_DBIAS
    if "ds" in wants and not beside_dbias:
        return c
    if c.block_m * c.block_n // threads >= _TWO_LOADS:
        return replace(c, block_n=max(c.block_n // 2, 16))
    return replace(c, block_r=max(c.block_r // 2, 16)) if "ds" in wants else c


def shrink_backward_launch(
    c: LaunchConfig, M: int, K: int, r: int, *, sms: int, precision: str, dropout: bool
) -> ShrinkBackwardLaunch:
    """Cuts M so that few columns keep all SMs busy."""
    col_blocks, rank_blocks = _blocks(K, c.block_k), _blocks(r, c.block_r)
    count, m_blocks = chunks(sms * c.ctas_per_sm, M, c.block_m, col_blocks * rank_blocks)
    return ShrinkBackwardLaunch(
        c, M, K, r, (col_blocks, count, rank_blocks), m_blocks, precision, dropout
    )


def lora_linear_launch(
    c: LaunchConfig,
    shrink: LaunchConfig,
    M: int,
    K: int,
    N: int,
    r: int,
    *,
    sms: int,
    dtype: torch.dtype,
    precision: str,
    tma: bool,
    by_rows: bool = True,
    bias: bool = False,
    dropout: bool = False,
) -> LoraLinearLaunch | None:
    """A layer's forward in one launch; None where helpers can't serve it."""
    helpers = None
    if may_help(dtype):
        helpers = forward_helpers(c, shrink, M, K, N, r, dtype.itemsize, dropout, sms)
    if helpers is None:
        return None
    gemm = linear_expand_launch(
        c, M, K, N, r, sms=sms, dtype=dtype, precision=precision, tma=tma, by_rows=by_rows,
        bias=bias, helpers=helpers,
    )  # fmt: skip
    return LoraLinearLaunch(gemm, helpers, shrink)


def precision_of(dtype: torch.dtype, tf32: bool) -> str:
    """How float32 operands are rounded: as PyTorch's own products round them; beside float16 to its
    significand, with float32's range."""
    if dtype is torch.float16:
        return "tf32"
    return "tf32" if dtype is torch.float32 and tf32 else "ieee"


def tma_fits(dtype: torch.dtype, x: Layout, weight: Layout, M: int, K: int, N: int) -> bool:
    """Whether TMA can read x ``[M, K]`` and the weight, and write a new ``[M, N]``: rows of neighbours
    that begin at multiples of 16 bytes, extents in 31 bits."""
    y = Layout.fresh(M, N, dtype)
    straight = weight.rows == 16 or (weight.rows == 0 and weight.columns == 16)
    aligned = x.rows == 16 and y.rows == 16 and straight
    return aligned and min(M, K, N) > 0 and not (x.huge or weight.huge or y.huge)


def may_help(dtype: torch.dtype) -> bool:
    """Whether this dtype has helpers: float16's skinny work is in float32, in other tiles."""
    return wide(dtype) is dtype


def _plan(
    config: LaunchConfig, M: int, K: int, N: int, r: int, size: int, sms: int
) -> Helpers | None:
    """The helpers for a GEMM ``[M, K] · [K, N]`` beside which they read x; ``size`` is an element's.

    None where helpers can't serve: none in the configuration, a rank that is looped over, or skinny work
    that would outlast half of the GEMM. Whether they pay, ``rounds`` says.
    """
    if r > UNROLLED_RANK_BLOCKS * config.block_r or K == 0:
        return None
    tiles = _blocks(M, config.block_m) * _blocks(N, config.block_n)
    programs = sms * config.ctas_per_sm
    helpers = config.helpers
    if not 0 < helpers < programs:
        return None
    tile_flops = 2 * config.block_m * config.block_n * K
    alone = _blocks(tiles, programs)
    waves = -(-M * K * size * _FLOPS_PER_BYTE // (helpers * tile_flops))

    def rounds(missed: int) -> int:
        return missed + _blocks(max(tiles - missed * (programs - helpers), 0), programs)

    if 2 * waves > alone:
        return None
    # More time for helpers where no other program takes a round more for it.
    while 2 * (waves + 1) <= alone and rounds(waves + 1) == rounds(waves):
        waves += 1
    return Helpers(helpers, waves, programs, rounds(waves), alone)


def forward_helpers(
    gemm: LaunchConfig,
    shrink: LaunchConfig,
    M: int,
    K: int,
    N: int,
    r: int,
    size: int,
    masked: bool,
    sms: int,
) -> Helpers | None:
    """The helpers of a layer's forward; ``size`` is an element's. A mask would keep them too long."""
    if masked or r > shrink.block_r:
        return None
    return _plan(gemm, M, K, N, r, size, sms)


def _blocks(length: int, block: int) -> int:
    return -(-length // block)
