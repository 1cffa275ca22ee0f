"""Helper CTAs: programs of the GEMM's launch that do the skinny work before they take tiles.

A pass over x leaves the tensor cores idle, the GEMM leaves memory nearly idle: a few programs do the
first beside the second. They take items of skinny work from a queue, in the order in which tiles need
them, and raise a flag for what is complete; a tile waits for its flag only before its last step.

It ends: a program helps if its ticket, drawn when it starts, is among the first, so whoever waits
runs after every helper has started; helpers take items one by one and wait for nothing before the queue
is empty and what they took is done; hence every flag is raised. No order in which the device starts
programs, and no number of them that it runs at once, is assumed.

The counters of a launch (``kernels.common.counters``): tickets, next item, finished programs, then a
flag for each row block. The last program to finish clears them for the next launch.
"""

import triton
import triton.language as tl
from lorafast.kernels.common.device import arrive

TICKETS, ITEMS, FINISHED, FLAGS = (tl.constexpr(i) for i in range(4))
"""Slots of the counters; flags begin at the last one."""


@triton.jit
def tile_count(program, programs, tiles, waves, HELPERS: tl.constexpr):
    """How many rounds of tiles a program goes through, those that a helper misses counted."""
    late = tiles - waves * (programs - HELPERS)
    return waves + tl.maximum(tl.cdiv(late - place_of(program, programs, HELPERS), programs), 0)


@triton.jit
def tile_of(turn, program, programs, waves, HELPERS: tl.constexpr):
    """The tile of a program in a round: helpers have none in the first ``waves`` of them."""
    place = place_of(program, programs, HELPERS)
    early = turn * (programs - HELPERS) + place
    late = waves * (programs - HELPERS) + (turn - waves) * programs + place
    return tl.where(turn < waves, early, late)


@triton.jit
def place_of(program, programs, HELPERS: tl.constexpr):
    """The place of a program in a round: helpers come last, so that a round which isn't full leaves out
    them, who may be late."""
    return program - HELPERS + tl.where(program < HELPERS, programs, 0)


@triton.jit
def clear_when_last(counters_ptr, used, programs):
    """Puts the counters back to zero if every other program is done with them."""
    if arrive(counters_ptr + FINISHED) == programs - 1:
        for first in range(0, used, 1024):
            places = first + tl.arange(0, 1024)
            tl.store(counters_ptr + places, 0, mask=places < used)
