"""Riders: programs of the product's launch that do the thin work before they take tiles.

A pass over x leaves the tensor cores idle, the product leaves memory nearly idle: a few programs do the
first beside the second. They take items of thin work from a queue, in the order in which tiles need
them, and raise a flag for what is complete; a tile waits for its flag only before its last step.

It ends: a program rides if its ticket, drawn when it starts, is among the first, so whoever waits
runs after every rider has started; riders take items one by one and wait for nothing before the queue
is empty and what they took is done; hence every flag is raised. No order in which the device starts
programs, and no number of them that it runs at once, is assumed.

The counters of a launch (``kernels.common.counters``): tickets, next item, finished programs, then flags
and what the thin work counts for itself. The last program to finish clears them for the next launch.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.device import arrive
from lorafast.kernels.linear_expand.tile import UNROLLED_RANK_BLOCKS

TICKETS, ITEMS, FINISHED, FLAGS = (tl.constexpr(i) for i in range(4))
"""Places among the counters; flags begin at the last one."""

_FLOPS_PER_BYTE = 64
"""What a multiprocessor multiplies while it streams one byte: about 3,400 operations and 48 bytes a
clock on sm_90, from the data sheet; elsewhere of the same order."""


@triton.jit
def tile_count(program, programs, tiles, waves, RIDERS: tl.constexpr):
    """How many rounds of tiles a program goes through, those that a rider misses counted."""
    late = tiles - waves * (programs - RIDERS)
    return waves + tl.maximum(tl.cdiv(late - program, programs), 0)


@triton.jit
def tile_of(turn, program, programs, waves, RIDERS: tl.constexpr):
    """The tile of a program in a round: riders have none in the first ``waves`` of them."""
    early = turn * (programs - RIDERS) + program - RIDERS
    late = waves * (programs - RIDERS) + (turn - waves) * programs + program
    return tl.where(turn < waves, early, late)


@triton.jit
def clear_when_last(counters_ptr, used, programs):
    """Puts the counters back to zero if every other program is done with them."""
    if arrive(counters_ptr + FINISHED) == programs - 1:
        for first in range(0, used, 1024):
            places = first + tl.arange(0, 1024)
            tl.store(counters_ptr + places, 0, mask=places < used)


@dataclass(frozen=True)
class Plan:
    """How many programs ride, how many rounds of tiles they miss, how many programs there are."""

    riders: int
    waves: int
    programs: int


def plan(
    config: LaunchConfig,
    rows: int,
    depth: int,
    cols: int,
    r: int,
    rider_bytes: int,
    processors: int,
) -> Plan | None:
    """The riders for a product ``[rows, depth] · [depth, cols]`` beside which ``rider_bytes`` are read.

    None where they can't pay: no rider in the configuration, a rank that is looped over, too few tiles
    to ride beside, or thin work that would outlast half of the product.
    """
    if r > UNROLLED_RANK_BLOCKS * config.block_r:
        return None
    tiles = -(-rows // config.block_m) * -(-cols // config.block_n)
    programs = processors * config.per_processor
    riders = config.riders
    if not 0 < riders < programs or tiles < 2 * programs:
        return None
    tile_flops = 2 * config.block_m * config.block_n * depth
    waves = -(-rider_bytes * _FLOPS_PER_BYTE // (riders * tile_flops))
    if 2 * waves > -(-tiles // programs):
        return None
    return Plan(riders, waves, programs)
