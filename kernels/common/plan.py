"""Whether programs of a GEMM's launch do a layer's skinny work beside it, how many, and for how long.

``kernels/lora_linear`` says what these helpers do.
"""

from dataclasses import dataclass

import torch
from lorafast.kernels.common.configs import GROUP_M, UNROLLED_RANK_BLOCKS, LaunchConfig

from lorafast.reference import wide

_PARTIAL = 4
_FLOPS_PER_BYTE = 64
"""What an SM multiplies while it streams one byte: about 3,400 operations and 48 bytes a
clock on sm_90, from the data sheet; elsewhere of the same order."""


@dataclass(frozen=True)
class Plan:
    """How many programs help, how many rounds of tiles they miss, how many programs there are."""

    helpers: int
    waves: int
    programs: int


def may_help(dtype: torch.dtype) -> bool:
    """Whether layers of this dtype have helpers: float16's skinny work is in float32, in other tiles."""
    return wide(dtype) is dtype


def _plan(
    config: LaunchConfig,
    rows: int,
    depth: int,
    cols: int,
    r: int,
    helper_bytes: int,
    processors: int,
    waited_bytes: int = 0,
) -> Plan | None:
    """The helpers for a GEMM ``[rows, depth] · [depth, cols]`` beside which they read ``helper_bytes``.

    ``waited_bytes`` are what one helper alone reads last while tiles wait for it. None where helpers
    can't pay: none in the configuration, a rank that is looped over, too few tiles to work beside,
    skinny work that would outlast half of the GEMM, or a wait that would outlast a tile.
    """
    if r > UNROLLED_RANK_BLOCKS * config.block_r or depth == 0:
        return None
    tiles = -(-rows // config.block_m) * -(-cols // config.block_n)
    programs = processors * config.ctas_per_sm
    helpers = config.helpers
    if not 0 < helpers < programs or tiles < 2 * programs:
        return None
    tile_flops = 2 * config.block_m * config.block_n * depth
    if waited_bytes * _FLOPS_PER_BYTE > tile_flops:
        return None
    waves = -(-helper_bytes * _FLOPS_PER_BYTE // (helpers * tile_flops))
    if 2 * waves > -(-tiles // programs):
        return None
    return Plan(helpers, waves, programs)


def forward_helpers(
    product: LaunchConfig,
    shrink: LaunchConfig,
    M: int,
    K: int,
    N: int,
    r: int,
    size: int,
    masked: bool,
    processors: int,
) -> Plan | None:
    """The helpers of a layer's forward; ``size`` is an element's. A mask would keep them too long."""
    if masked or r > shrink.block_r:
        return None
    return _plan(product, M, K, N, r, M * K * size, processors)


def group_rows(product: LaunchConfig) -> int:
    """Rows of a row group of ds: as many as a group of tiles has, which are needed first."""
    return GROUP_M * product.block_m


def backward_helpers(
    product: LaunchConfig,
    expand_backward: LaunchConfig,
    shrink_backward: LaunchConfig,
    M: int,
    K: int,
    N: int,
    r: int,
    size: int,
    masked: bool,
    processors: int,
) -> Plan | None:
    """The helpers of a layer's backward, which make ds and dB, and without a mask dA."""
    if r > min(expand_backward.block_r, shrink_backward.block_r):
        return None
    # With a rank of several blocks the launch would spill: compiled for sm_90.
    if r > product.block_r or group_rows(product) % expand_backward.block_m:
        return None
    partials = _PARTIAL * r * -(-N // expand_backward.block_n)  # bytes a row of ds
    read = M * ((N if masked else N + K) * size + 2 * partials)
    return _plan(product, M, N, K, r, read, processors, group_rows(product) * partials)
