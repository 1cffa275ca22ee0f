"""The launches of a bottleneck adapter: who owns which rows, and which columns of them are written."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from lorafast.kernels.common.configs import LaunchConfig, chunks
from lorafast.kernels.common.plan import skinny_precision_of

from lorafast.core.problem import WANTS

GRADIENTS = WANTS["bottleneck_backward"]
_MOST_GROUPS = 8
"""Column groups of a row block. Each makes ``a`` for itself, so that of more the launch would hardly end
sooner."""


@dataclass(frozen=True)
class BottleneckLaunch:
    """``[M, K]`` is read, ``[M, N]`` written. ``grid``: row blocks, column groups of what is written; a
    group has ``n_blocks`` blocks of ``block_n``. Where N is 0: shares of K, of ``k_blocks`` blocks each.

    - ``activation``: one of ``ACTIVATIONS``; ``keeps``: whether ``a`` is stored;
    - ``down``, ``up``: the precision of the first product and of the second.
    """

    config: LaunchConfig
    M: int
    K: int
    N: int
    b: int
    grid: tuple[int, int]
    n_blocks: int
    k_blocks: int
    dtype: torch.dtype
    activation: str
    keeps: bool
    down: str
    up: str

    @property
    def split(self) -> bool:
        """Whether partial sums of the first product are left and added up by whoever comes last."""
        return self.N == 0 and self.grid[1] > 1


@dataclass(frozen=True)
class ColumnsLaunch:
    """``grid``: column blocks, first of dy ``[M, N]``, then of h ``[M, K]``; row groups; rank blocks. A
    row group has ``m_blocks`` blocks of M.

    - ``wants``: what of dh, dD, dU and du it makes;
    - ``precision``, ``up``: of the sums over rows, of the product in dh.
    """

    config: LaunchConfig
    M: int
    K: int
    N: int
    b: int
    grid: tuple[int, int, int]
    m_blocks: int
    wants: tuple[str, ...]
    precision: str
    up: str

    @property
    def of_dy(self) -> bool:
        """Whether it goes through dy."""
        return bool({"dU", "du"} & {*self.wants})

    @property
    def split(self) -> bool:
        """Whether partial sums are left and added up by whoever comes last."""
        return self.grid[1] > 1


@dataclass(frozen=True)
class BottleneckBackwardLaunch:
    """What a backward launches for ``wants``, of ``GRADIENTS``; None for what it doesn't need.

    - ``rows``: a pass over dy for da, z and dd; dh by a second one over the same rows, where its
      ``N`` isn't 0;
    - ``columns``: a pass over dy and one over h for the other sums over rows, and dh beside them.
    """

    rows: BottleneckLaunch | None
    columns: ColumnsLaunch | None
    wants: tuple[str, ...]
    residual: bool


def widest(dtype: torch.dtype) -> int:
    """The widest bottleneck for an h of ``dtype``: a program has all of ``a`` of its rows at once, and
    multiplies it in float32 from registers, twice as many."""
    return 256 if dtype is torch.bfloat16 else 128


def bottleneck_launch(
    c: LaunchConfig,
    M: int,
    K: int,
    N: int,
    b: int,
    *,
    sms: int,
    dtype: torch.dtype,
    tf32: bool,
    activation: str,
    keeps: bool = True,
) -> BottleneckLaunch:
    """A CTA for each row block. Where these don't fill the SMs, several share its columns when they
    write, and each reads all of its rows first; where nothing is written, ``N`` is 0 and several share
    the columns that are read."""
    assert b <= c.block_r, f"b is {b}, and the configuration is for up to {c.block_r}"
    row_blocks, col_blocks = _blocks(M, c.block_m), _blocks(N, c.block_n)
    wanted = sms * c.ctas_per_sm // max(row_blocks, 1)
    if N:
        groups = min(max(wanted, 1), col_blocks, _MOST_GROUPS)
        n_blocks, k_blocks = _blocks(col_blocks, groups), _blocks(K, c.block_k)
        grid = row_blocks, _blocks(col_blocks, n_blocks)
    else:
        count, k_blocks = chunks(sms * c.ctas_per_sm, K, c.block_k, row_blocks)
        n_blocks, grid = 0, (row_blocks, count)
    return BottleneckLaunch(
        c, M, K, N, b, grid, n_blocks, k_blocks, dtype, activation, keeps,
        down=skinny_precision_of(dtype, tf32), up=_up_precision(dtype, tf32),
    )  # fmt: skip


def bottleneck_backward_launch(
    rules: Mapping[str, LaunchConfig],
    M: int,
    K: int,
    N: int,
    b: int,
    *,
    sms: int,
    dtype: torch.dtype,
    tf32: bool,
    activation: str,
    wants: tuple[str, ...],
    residual: bool,
) -> BottleneckBackwardLaunch:
    """``rules``: a configuration for each of its launches, by name. ``dh = dy + da·D`` is made where dy
    is read for dU or du anyway, if all ranks are there at once. With another residual it takes no dy:
    the launch over rows writes it."""
    asked = {*wants}
    of_da = asked & {"dh", "dD", "dd"}
    dh_beside = not residual and bool(asked & {"dU", "du"}) and b <= rules["columns"].block_r
    rows = columns = None
    if asked & {"dh", "dD", "dd", "dU"}:
        rows = bottleneck_launch(
            rules["rows"], M, N if of_da else 0, K if "dh" in asked and not dh_beside else 0, b,
            sms=sms, dtype=dtype, tf32=tf32, activation=activation,
        )  # fmt: skip
    if asked & {"dD", "dU", "du"}:
        made = tuple(
            name for name in wants if name in ("dD", "dU", "du") or (name == "dh" and dh_beside)
        )
        columns = _columns_launch(
            rules["columns"], M, K, N, b, sms=sms, dtype=dtype, tf32=tf32, wants=made,
        )  # fmt: skip
    return BottleneckBackwardLaunch(rows, columns, wants, residual)


def _columns_launch(
    c: LaunchConfig,
    M: int,
    K: int,
    N: int,
    b: int,
    *,
    sms: int,
    dtype: torch.dtype,
    tf32: bool,
    wants: tuple[str, ...],
) -> ColumnsLaunch:
    """A CTA for each column block, row group and rank block; rows are cut until they fill the SMs."""
    of_dy = _blocks(N, c.block_k) if {"dU", "du"} & {*wants} else 0
    of_h = _blocks(K, c.block_k) if "dD" in wants else 0
    # du alone has no rank: one block, since each block more would read dy once more.
    ranks = _blocks(b, c.block_r) if wants != ("du",) else 1
    groups, m_blocks = chunks(sms * c.ctas_per_sm, M, c.block_m, (of_dy + of_h) * ranks)
    return ColumnsLaunch(
        c, M, K, N, b, (of_dy + of_h, groups, ranks), m_blocks, wants,
        precision=skinny_precision_of(dtype, tf32), up=_up_precision(dtype, tf32),
    )  # fmt: skip


def _up_precision(dtype: torch.dtype, tf32: bool) -> str:
    """As expand has it: of float16's products with z in float32, y would show TF32's rounding."""
    return "tf32x3" if dtype is torch.float16 else skinny_precision_of(dtype, tf32)


def _blocks(length: int, block: int) -> int:
    return -(-length // block)
