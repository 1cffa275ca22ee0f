"""What a launch may ask for, and what a kernel's directives say of its launches."""

import math
from numbers import Integral
from typing import Any

from .program import Program

MOST_THREADS = 1024
MOST_BLOCK = (1024, 1024, 64)
MOST_GRID = (2**31 - 1, 65535, 65535)
MOST_CLUSTER = 16
"""CTAs; from 9 on CUDA wants the kernel's attribute that allows clusters which aren't portable."""
SHARED = {
    "sm_75": 65_536, "sm_80": 166_912, "sm_86": 101_376, "sm_87": 166_912, "sm_88": 101_376,
    "sm_89": 101_376, "sm_120": 101_376, "sm_121": 101_376,
}  # fmt: skip
"""Bytes of shared memory that a CTA may have (CUDA Programming Guide, Compute Capabilities)."""
MOST_SHARED = 232_448
"""That of sm_90, sm_100 and whatever isn't known."""


def shared_limit(target: str) -> int:
    """Of the chip that a ``.target`` names."""
    return SHARED.get(target.rstrip("af"), MOST_SHARED)


def three(what: str, sizes: Any) -> tuple[int, int, int]:
    """``sizes`` with ones behind them. Raises ValueError."""
    if (
        not isinstance(sizes, (tuple, list))
        or not 0 < len(sizes) <= 3
        or any(not isinstance(n, Integral) or n < 1 for n in sizes)
    ):
        raise ValueError(f"{what} is {sizes}, expected one to three positive integers")
    return (*map(int, sizes), 1, 1)[:3]  # type: ignore[return-value]


def cluster_of(program: Program, cluster: Any) -> tuple[int, int, int]:
    """That of a launch: what the caller says, else what the kernel's directives say, else one CTA."""
    if cluster is None:
        cluster = program.directives.get("reqnctapercluster") or (1,)
    return three(f"{program.name}: cluster", cluster)


def why_not(
    program: Program,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    cluster: tuple[int, int, int],
    shared: int,
    limit: int,
) -> str | None:
    """Why CUDA refuses to launch a kernel so, with ``shared`` bytes of dynamic shared memory."""
    says = program.directives
    threads, ctas = math.prod(block), math.prod(cluster)
    if threads > MOST_THREADS:
        return f"a block of {block} has {threads} threads, more than {MOST_THREADS}"
    for what, sizes, most in (("block", block, MOST_BLOCK), ("grid", grid, MOST_GRID)):
        if any(n > m for n, m in zip(sizes, most, strict=True)):
            return f"a {what} of {sizes} is more than {most}"
    required = says.get("reqntid")
    if required and block != three("reqntid", required):
        return f"a block of {block} is not what .reqntid says, {_listed(required)}"
    # PTX ISA, Performance-Tuning Directives: .maxntid: the product of its numbers is the limit.
    most_threads = math.prod(says.get("maxntid", (MOST_THREADS,)))
    if threads > most_threads:
        return f"a block of {block} has {threads} threads, more than .maxntid's {most_threads}"
    if ctas > MOST_CLUSTER:
        return f"a cluster of {cluster} has {ctas} CTAs, more than {MOST_CLUSTER}"
    required = says.get("reqnctapercluster")
    if required and cluster != three("reqnctapercluster", required):
        return f"a cluster of {cluster} is not what .reqnctapercluster says, {_listed(required)}"
    (most_rank,) = says.get("maxclusterrank", (MOST_CLUSTER,))
    if ctas > most_rank:
        return f"a cluster of {cluster} has {ctas} CTAs, more than .maxclusterrank's {most_rank}"
    if any(g % c for g, c in zip(grid, cluster, strict=True)):
        return f"a grid of {grid} is not made of clusters of {cluster}"
    if not isinstance(shared, Integral) or shared < 0:
        return f"shared is {shared}, expected bytes of dynamic shared memory"
    if program.static + shared > limit:
        needs = f"{program.static} + {shared}" if shared else f"{program.static}"
        return f"needs {needs} bytes of shared memory, and the chip has {limit}"
    return None


def check_trace(trace: Any, grid: tuple[int, int, int], block: tuple[int, int, int]) -> None:
    """Raises ValueError unless ``trace`` is a CTA of the grid and a thread of it, both linear."""
    given = (trace, *trace) if isinstance(trace, tuple) and len(trace) == 2 else (trace,)
    if len(given) != 3 or any(not isinstance(n, Integral) or n < 0 for n in given[1:]):
        raise ValueError(f"trace is {trace!r}, expected a CTA and a thread")
    for what, number, of, most in (
        ("CTA", given[1], "the grid", math.prod(grid)),
        ("thread", given[2], "the block", math.prod(block)),
    ):
        if number >= most:
            raise ValueError(f"trace is of {what} {number}, and {of} has {most}")


def _listed(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sizes))
