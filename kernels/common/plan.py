"""Launches: what a kernel is launched with, computed from the sizes of a call and a configuration.

A launch has everything but the tensors: the grid, the shares of a reduction, TMA or pointers, helper
CTAs. It says how sums are cut, so the last bits of a result depend on it: on the bucket of M, the number
of SMs and the tables. A row's result may differ between batches of different sizes (the kernels are not
batch-invariant). It never differs between two runs of one call.

``kernels/lora_linear`` says what helper CTAs do.
"""

from dataclasses import dataclass, replace

import torch
from lorafast.kernels.common.configs import (
    GROUP_M,
    UNROLLED_RANK_BLOCKS,
    LaunchConfig,
    chunks,
    split_k,
)

from lorafast.core.problem import Layout
from lorafast.reference import wide

_PARTIAL = 4
_FLOPS_PER_BYTE = 97
"""FLOPs of an SM in the time in which a helper reads one byte: on sm_90 3,400 FLOPs a clock, over 35
bytes a clock beside the GEMM. Elsewhere it is of the same order."""


_TWO_LOADS = 16
"""Elements of 16 bits that a thread gets by two loads of 16 bytes."""
_MOST_BESIDE_DBIAS = 16
"""Elements of dB in a thread's registers, beside which it can sum dbias without spilling."""


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
class LinearExpandLaunch:
    """A GEMM ``[M, K] · [K, N]`` with its low-rank term, by ``programs`` CTAs that take tiles in turn.

    - ``splits``: the shares into which K is cut;
    - ``parts``: the parts of its columns in which a tile is written;
    - ``tma``: load and store by TMA, else by pointers;
    - ``transposed``: multiply by the weight, not by its transpose;
    - ``n_major``: TMA reads the second matrix as ``[K, N]``, as it lies in memory;
    - ``rank_blocks``: the unrolled blocks of the rank, 0 if they are looped over.
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
    """``helpers`` of the ``programs`` CTAs do skinny work first, and miss ``waves`` rounds of tiles.

    ``rounds``: rounds of tiles that the launch takes; ``alone``: that the GEMM takes without helpers.
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


@dataclass(frozen=True)
class LoraLinearBackwardLaunch:
    """The GEMM of dx, beside which helpers make ds, dB and ``dbias`` by ``rows``, and dA by ``columns``
    unless that has a launch of its own. ``groups``: column groups of ds, row groups of dB."""

    gemm: LinearExpandLaunch
    helpers: Helpers
    rows: LaunchConfig
    columns: LaunchConfig
    groups: tuple[int, int]
    shrink_backward: ShrinkBackwardLaunch | None
    dbias: bool


def shrink_launch(
    c: LaunchConfig, M: int, K: int, r: int, *, sms: int, precision: str, dropout: bool
) -> ShrinkLaunch:
    """A CTA for each row block, share of K and rank block; K is cut until they fill the SMs."""
    row_blocks, rank_blocks = _blocks(M, c.block_m), _blocks(r, c.block_r)
    count, k_blocks = chunks(sms * c.ctas_per_sm, K, c.block_k, row_blocks * rank_blocks)
    return ShrinkLaunch(c, M, K, r, (row_blocks, count, rank_blocks), k_blocks, precision, dropout)


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
    """``tma``: whether TMA can read and write the operands; ``c`` says whether it should.

    ``by_rows``: whether the elements of a row of the weight are neighbours in memory. With ``helpers`` K
    is not cut, and their CTAs are among the launch's.
    """
    tiles = _blocks(M, c.block_m) * _blocks(N, c.block_n)
    if helpers is None:
        splits = split_k(sms, tiles, _blocks(K, c.block_k))
        programs = min(tiles * splits, sms * c.ctas_per_sm)
    else:
        splits, programs = 1, helpers.programs
    described = c.descriptors and tma
    # Pointers of two tiles at a time take too many registers; a split has too much after its main loop.
    flatten = described and c.flatten and splits == 1
    unrolled = UNROLLED_RANK_BLOCKS if flatten else 1
    if dtype is torch.float16:
        # s is float32 beside it: several blocks at once don't fit into shared memory.
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
    """A CTA for each column group, row group and rank block."""
    c = _fitting(c, wants)
    # dbias alone has no rank: one block, since each block more would read dy once more.
    ranks = max(r, 1) if {"ds", "dB"} & set(wants) else 1
    col_groups, rank_blocks = _blocks(N, c.block_n), _blocks(ranks, c.block_r)
    row_groups, m_blocks = chunks(
        sms * c.ctas_per_sm, M, c.block_m, max(col_groups * rank_blocks, 1)
    )
    grid = (col_groups, row_groups, rank_blocks)
    return ExpandBackwardLaunch(c, M, N, r, grid, m_blocks, precision, wants)


def _fitting(c: LaunchConfig, wants: tuple[str, ...]) -> LaunchConfig:
    """Smaller tiles where the tables' would spill, as compiling them has shown.

    Half the columns: without ds that costs nothing, since there are no partial sums of ds. Half the
    ranks where a thread would be left with less than 16 bytes of dy.
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
    """A CTA for each column block, share of M and rank block; M is cut until they fill the SMs."""
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


def lora_linear_backward_launch(
    c: LaunchConfig,
    rows: LaunchConfig,
    columns: LaunchConfig,
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
    dropout: bool = False,
    dbias: bool = False,
    alone: LaunchConfig | None = None,
) -> LoraLinearBackwardLaunch | None:
    """A layer's backward in one launch; with a mask dA has its own, by ``alone``. None where helpers
    can't serve it."""
    helpers = None
    if may_help(dtype):
        helpers = backward_helpers(c, rows, columns, M, K, N, r, dtype.itemsize, dropout, sms)
    if helpers is None:
        return None
    gemm = linear_expand_launch(
        c, M, N, K, r, sms=sms, dtype=dtype, precision=precision, tma=tma, transposed=True,
        by_rows=by_rows, dropout=dropout, helpers=helpers,
    )  # fmt: skip
    groups = _blocks(N, rows.block_n), _blocks(M, group_rows(c))
    last = None
    if dropout:
        last = shrink_backward_launch(
            alone or columns, M, K, r, sms=sms, precision=precision, dropout=True
        )
    return LoraLinearBackwardLaunch(gemm, helpers, rows, columns, groups, last, dbias)


def precision_of(dtype: torch.dtype, tf32: bool) -> str:
    """The precision of products of float32 operands: that of PyTorch's own GEMMs. Beside float16 it is
    TF32, which has float16's significand and float32's range."""
    if dtype is torch.float16:
        return "tf32"
    return "tf32" if dtype is torch.float32 and tf32 else "ieee"


def tma_fits(dtype: torch.dtype, x: Layout, weight: Layout, M: int, K: int, N: int) -> bool:
    """Whether TMA can read x ``[M, K]`` and the weight, and write a new ``[M, N]``.

    It needs rows whose elements are neighbours and which begin at multiples of 16 bytes, and extents of
    31 bits.
    """
    y = Layout.fresh(M, N, dtype)
    straight = weight.rows == 16 or (weight.rows == 0 and weight.columns == 16)
    aligned = x.rows == 16 and y.rows == 16 and straight
    return aligned and min(M, K, N) > 0 and not (x.huge or weight.huge or y.huge)


def may_help(dtype: torch.dtype) -> bool:
    """Whether helpers serve layers of this dtype: not float16, whose skinny work is in float32."""
    return wide(dtype) is dtype


def _plan(
    config: LaunchConfig,
    rows: int,
    depth: int,
    cols: int,
    r: int,
    helper_bytes: int,
    sms: int,
    waited_bytes: int = 0,
) -> Helpers | None:
    """The helpers for a GEMM ``[rows, depth] · [depth, cols]`` beside which they read ``helper_bytes``.

    ``waited_bytes`` are what one helper alone reads last while tiles wait for it. None where helpers
    can't serve: none in the configuration, a rank that is looped over, skinny work that would outlast
    half of the GEMM, or a wait that would outlast a tile. Whether they pay, ``rounds`` says.
    """
    if r > UNROLLED_RANK_BLOCKS * config.block_r or depth == 0:
        return None
    tiles = _blocks(rows, config.block_m) * _blocks(cols, config.block_n)
    programs = sms * config.ctas_per_sm
    helpers = config.helpers
    if not 0 < helpers < programs:
        return None
    tile_flops = 2 * config.block_m * config.block_n * depth
    if waited_bytes * _FLOPS_PER_BYTE > tile_flops:
        return None
    alone = _blocks(tiles, programs)
    waves = -(-helper_bytes * _FLOPS_PER_BYTE // (helpers * tile_flops))

    def rounds(missed: int) -> int:
        return missed + _blocks(max(tiles - missed * (programs - helpers), 0), programs)

    if 2 * waves > alone:
        return None
    # Give helpers more time while the other CTAs need no round more for it.
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
    return _plan(gemm, M, K, N, r, M * K * size, sms)


def group_rows(gemm: LaunchConfig) -> int:
    """Rows of a row group of ds: as many as a group of tiles has, which are needed first."""
    return GROUP_M * gemm.block_m


def backward_helpers(
    gemm: LaunchConfig,
    expand_backward: LaunchConfig,
    shrink_backward: LaunchConfig,
    M: int,
    K: int,
    N: int,
    r: int,
    size: int,
    masked: bool,
    sms: int,
) -> Helpers | None:
    """The helpers of a layer's backward, which make ds and dB, and without a mask dA."""
    if r > min(expand_backward.block_r, shrink_backward.block_r):
        return None
    # With a rank of several blocks the launch would spill: compiled for sm_90.
    if r > gemm.block_r or group_rows(gemm) % expand_backward.block_m:
        return None
    partials = _PARTIAL * r * _blocks(N, expand_backward.block_n)  # bytes a row of ds
    read = M * ((N if masked else N + K) * size + 2 * partials)
    return _plan(gemm, M, N, K, r, read, sms, group_rows(gemm) * partials)


def _blocks(length: int, block: int) -> int:
    return -(-length // block)
