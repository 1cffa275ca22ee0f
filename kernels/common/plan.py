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
    LaunchConfig,
    chunks,
    split_k,
)

from lorafast.core.problem import Layout
from lorafast.reference import wide

_FLOPS_PER_BYTE = 97
"""FLOPs of an SM in the time in which a helper reads one byte: on sm_90 3,400 FLOPs a clock, over 35
bytes a clock beside the GEMM; executed, a helper's item takes no less than a clock for 51 bytes
(``tests/ptx/counts.py``). Elsewhere it is of the same order."""
_MOST_READ = 3
"""A third of the programs, as helpers, read what device memory gives: on sm_90 12 bytes a clock and
SM."""


_TWO_LOADS = 16
"""Elements of 16 bits that a thread gets by two loads of 16 bytes."""
_MOST_BESIDE_A_MASK = 64
"""Elements of a GEMM's accumulator in a thread's registers, beside which it can make a mask."""
_WARPS = 8
"""Of a GEMM, at most."""
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
    """A GEMM ``[M, K] · [K, N]`` with its low-rank term, by ``programs`` CTAs that take tiles in turn.

    - ``splits``: the shares into which K is cut;
    - ``parts``: the parts of its columns in which a tile is written, and its mask made;
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

    ``rounds``: how long the launch takes, a round of tiles being 1; ``alone``: how many rounds the GEMM
    takes without helpers.
    """

    helpers: int
    waves: int
    programs: int
    rounds: float = 1
    alone: int = 1


@dataclass(frozen=True)
class LoraLinearLaunch:
    """The GEMM of y, beside which helpers shrink as ``shrink`` says."""

    gemm: LinearExpandLaunch
    helpers: Helpers
    shrink: LaunchConfig


@dataclass(frozen=True)
class WeightNormLaunch:
    """A pass over W ``[N, K]`` by ``programs`` CTAs of ``block_n`` rows each.

    ``rank_blocks``: of one or two, B is kept; more are looped over, and B is read again for each block
    of K.
    """

    config: LaunchConfig
    N: int
    K: int
    r: int
    programs: int
    rank_blocks: int


def weight_norm_launch(N: int, K: int, r: int, *, sms: int) -> WeightNormLaunch:
    """With more rows a CTA A is read less often, as long as CTAs fill the SMs. Longer tiles would
    spill, and so would fewer warps beside more ranks: found by compiling. A product has few ranks: of 64
    tensor cores, which cut sums off, were 3 % further off than the contract allows, on an H200."""
    block_n = 32 if _blocks(N, 32) >= sms else 16
    block_r = 16 if r <= 16 else 32
    few = block_n == 16 and 32 < r <= 64
    warps = 4 if block_r == 16 or few else 8
    stages = 3 if few else 6 if r <= 32 else 4  # of which sm_86 has no shared memory for more
    c = LaunchConfig(16, block_n, 64, block_r, warps, stages)
    return WeightNormLaunch(c, N, K, r, _blocks(N, block_n), _blocks(r, block_r))


def shrink_launch(
    c: LaunchConfig, M: int, K: int, r: int, *, sms: int, precision: str, dropout: bool
) -> ShrinkLaunch:
    """A CTA for each row block, share of K and rank block; K is cut until they fill the SMs."""
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
    """``tma``: whether TMA can read and write the operands; ``c`` says whether it should.

    ``by_rows``: whether the elements of a row of the weight are neighbours in memory. With ``helpers`` K
    is not cut, and their CTAs are among the launch's.
    """
    if dropout:
        c = with_room(c)
    tiles = _blocks(M, c.block_m) * _blocks(N, c.block_n)
    if helpers is None:
        splits = split_k(sms, tiles, _blocks(K, c.block_k))
        programs = min(tiles * splits, sms * c.ctas_per_sm)
    else:
        splits, programs = 1, helpers.programs
    described = c.descriptors and tma
    flatten = described and c.flatten and splits == 1 and _may_flatten(dtype, r, c, dropout)
    # In float32 a block of factors at once doesn't fit in shared memory.
    unrolled = 0 if dtype is torch.float16 and dropout else 1
    rank_blocks = _blocks(r, c.block_r)
    return LinearExpandLaunch(
        c, M, K, N, r, tiles, splits, programs, described, flatten,
        rank_blocks=rank_blocks if rank_blocks <= unrolled else 0,
        parts=c.masked_parts if dropout else c.parts,
        transposed=transposed, n_major=described and by_rows is transposed,
        precision=precision, bias=bias, dropout=dropout,
    )  # fmt: skip


def _may_flatten(dtype: torch.dtype, r: int, c: LaunchConfig, dropout: bool) -> bool:
    """With pointers the loads of two tiles are too many registers, a mask beside them is, too; a split
    has too much after its main loop; with several blocks of the rank ptxas serializes sm_90's wgmma;
    float16's factors Triton 3.6 can't pipeline so: found by compiling."""
    return r <= c.block_r and not dropout and dtype is not torch.float16


def with_room(c: LaunchConfig) -> LaunchConfig:
    """Fewer elements a thread where an accumulator and a mask would spill: by more warps, else by half
    the columns. What is flattened without a mask has room for one: found by compiling."""
    if _crowded(c) and c.num_warps < _WARPS:
        c = replace(c, num_warps=_WARPS)
    return replace(c, block_n=c.block_n // 2) if _crowded(c) and not c.flatten else c


def _crowded(c: LaunchConfig) -> bool:
    return c.block_m * c.block_n // (32 * c.num_warps) > _MOST_BESIDE_A_MASK


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


def precision_of(dtype: torch.dtype, tf32: bool) -> str:
    """The precision of products of float32 operands: that of PyTorch's own GEMMs. Beside float16 it is
    TF32, which has float16's significand and float32's range."""
    if dtype is torch.float16:
        return "tf32"
    return "tf32" if dtype is torch.float32 and tf32 else "ieee"


def skinny_precision_of(dtype: torch.dtype, tf32: bool) -> str:
    """The same in ``shrink`` and ``shrink_backward``: float32 as the sum of two numbers in TF32, which
    is as exact as PyTorch's float32, on tensor cores: on an H100 a fifth of the time."""
    found = precision_of(dtype, tf32)
    return "tf32x3" if found == "ieee" and dtype is torch.float32 else found


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
    """Whether this dtype has helpers: float16's skinny work is in float32, in other tiles."""
    return wide(dtype) is dtype


def _plan(
    config: LaunchConfig, M: int, K: int, N: int, r: int, size: int, sms: int
) -> Helpers | None:
    """The helpers for a GEMM ``[M, K] · [K, N]`` beside which they read x; ``size`` is an element's.

    They miss so many rounds that the launch ends soonest, and as many as that allows: then they may be
    slower than they were taken to be. None where helpers can't serve: none in the configuration, a rank
    of several blocks, tiles of one round, whose K is better cut, or skinny work that would outlast half
    of the GEMM. Whether they pay, ``rounds`` says.
    """
    if r > config.block_r or K == 0:
        return None
    row_blocks = _blocks(M, config.block_m)
    tiles = row_blocks * _blocks(N, config.block_n)
    programs, helpers = sms * config.ctas_per_sm, config.helpers
    if not 0 < helpers < programs:
        return None
    alone = _blocks(tiles, programs)
    skinny = skinny_rounds(config, row_blocks, size, programs)
    if alone < 2 or 2 * skinny > alone:
        return None

    def rounds(missed: int) -> float:
        others = programs - helpers
        late = max(tiles - missed * others, 0)
        # The last round is the others' first.
        of_helpers = skinny + _blocks(max(late - others, 0), programs)
        return max(missed + _blocks(late, programs), of_helpers)

    waves = min(range(alone // 2, -1, -1), key=rounds)
    return Helpers(helpers, waves, programs, rounds(waves), alone)


def skinny_rounds(config: LaunchConfig, row_blocks: int, size: int, programs: int) -> float:
    """How many rounds of tiles the skinny work takes, whichever is longer: of the helper that has most
    of it, or of memory, for all of it."""
    of_one = _blocks(row_blocks, config.helpers)
    most = max(of_one, row_blocks * _MOST_READ / programs)
    return most * item_rounds(config.block_n, size)


def item_rounds(block_n: int, size: int) -> float:
    """How long a row block of x, in elements of ``size`` bytes, keeps a helper; a tile takes 1."""
    return size * _FLOPS_PER_BYTE / (2 * block_n)


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
