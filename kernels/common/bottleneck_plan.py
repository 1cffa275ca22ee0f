"""The launches of a bottleneck adapter: who owns which rows, and which columns of them are written."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.plan import (
    ExpandBackwardLaunch,
    ShrinkBackwardLaunch,
    expand_backward_launch,
    precision_of,
    shrink_backward_launch,
    skinny_precision_of,
)

from lorafast.core.problem import WANTS

GRADIENTS = WANTS["bottleneck_backward"]
_MOST_GROUPS = 8
"""Column groups of a row block. Each makes ``a`` for itself, so that of more the launch would hardly end
sooner."""


@dataclass(frozen=True)
class BottleneckLaunch:
    """``[M, K]`` is read, ``[M, N]`` written. ``grid``: row blocks, column groups of what is written; a
    group has ``n_blocks`` blocks of ``block_n``.

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
    dtype: torch.dtype
    activation: str
    keeps: bool
    down: str
    up: str


@dataclass(frozen=True)
class BottleneckBackwardLaunch:
    """What a backward launches for ``wants``, of ``GRADIENTS``; None for what it doesn't need.

    - ``rows``: a pass over dy for da and z, and its second for dh;
    - ``columns``: another pass over dy for dU and du, as ``expand_backward`` has it;
    - ``down``: a pass over h for dD, as ``shrink_backward`` has it.
    """

    rows: BottleneckLaunch | None
    columns: ExpandBackwardLaunch | None
    down: ShrinkBackwardLaunch | None
    wants: tuple[str, ...]


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
    write, and each reads all of its rows first. ``N`` is 0 where nothing is written."""
    assert b <= c.block_r, f"b is {b}, and the configuration is for up to {c.block_r}"
    row_blocks, col_blocks = _blocks(M, c.block_m), max(_blocks(N, c.block_n), 1)
    wanted = sms * c.ctas_per_sm // max(row_blocks, 1)
    groups = min(max(wanted, 1), col_blocks, _MOST_GROUPS)
    n_blocks = _blocks(col_blocks, groups)
    grid = row_blocks, _blocks(col_blocks, n_blocks)
    down = skinny_precision_of(dtype, tf32)
    # As expand has it: of float16's products with z in float32, y would show TF32's rounding.
    up = "tf32x3" if dtype is torch.float16 else down
    return BottleneckLaunch(c, M, K, N, b, grid, n_blocks, dtype, activation, keeps, down, up)


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
) -> BottleneckBackwardLaunch:
    """``rules``: a configuration for each of its launches, by name."""
    rows = columns = down = None
    if {"dh", "dD", "dd", "dU"} & set(wants):
        rows = bottleneck_launch(
            rules["rows"], M, N, K if "dh" in wants else 0, b,
            sms=sms, dtype=dtype, tf32=tf32, activation=activation,
        )  # fmt: skip
    of_dy = tuple(name for name, own in (("dB", "dU"), ("dbias", "du")) if own in wants)
    if of_dy:
        columns = expand_backward_launch(
            rules["columns"], M, N, b, sms=sms, precision=precision_of(dtype, tf32), wants=of_dy
        )
    if "dD" in wants:
        down = shrink_backward_launch(
            rules["down"], M, K, b,
            sms=sms, precision=skinny_precision_of(dtype, tf32), dropout=False,
        )  # fmt: skip
    return BottleneckBackwardLaunch(rows, columns, down, wants)


def _blocks(length: int, block: int) -> int:
    return -(-length // block)
