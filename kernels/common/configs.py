"""Launch configurations: one table, one validity predicate, one look-up, one way to cut a length.

A row of ``TABLE[operation]`` reads

    (element size in bytes, largest rank it serves, LaunchConfig)

and the first row that fits the call is used; a rank beyond the last row is cut into blocks of
``block_r``. Rows were chosen to compile without spilling and within the shared memory of every
architecture in ``SHARED_MEMORY``; none has been tuned for speed on a GPU.
"""

from dataclasses import dataclass

SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Compute capability → bytes of shared memory that one block may use."""


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched.

    ``block_m`` rows, ``block_n`` output columns and ``block_k`` columns of the contracted dimension
    per tile (an operation ignores what it doesn't have), ``block_r`` columns of the rank.
    """

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, object]:
        """What a launch passes to the compiler."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            # Said outright because its default changes with Triton 3.10.
            "enable_fp_fusion": True,
        }


# operand tiles (rows, columns) that a pipeline stage holds in shared memory
_STAGE_TILES = {
    "shrink": (("block_m", "block_k"), ("block_r", "block_k")),
    "linear_expand": (("block_m", "block_k"), ("block_n", "block_k")),
    "expand_backward": (("block_m", "block_n"), ("block_m", "block_r")),
    "shrink_backward": (("block_m", "block_k"), ("block_m", "block_r")),
}
# float32 accumulators (rows, columns) that a program keeps in registers
_ACCUMULATORS = {
    "shrink": (("block_m", "block_r"),),
    "linear_expand": (("block_m", "block_n"),),
    "expand_backward": (("block_m", "block_r"), ("block_n", "block_r")),
    "shrink_backward": (("block_r", "block_k"),),
}
OPERATIONS = tuple(_STAGE_TILES)


def why_invalid(
    operation: str, config: LaunchConfig, element_size: int, capability: int
) -> str | None:
    """The reason for which ``config`` can't serve ``operation`` on this architecture, or None.

    ``element_size`` is that of the activations in bytes, ``capability`` the compute capability as
    in ``sm_90``. The shared-memory and register counts are lower bounds: what passes may still be
    too large, which the compiled code tells; what is refused here would certainly fail.
    """
    blocks = {name: getattr(config, name) for name in ("block_m", "block_n", "block_k", "block_r")}
    for name, size in blocks.items():
        if size < 16 or size & (size - 1):
            return f"{name} is {size}: tl.dot needs powers of two of at least 16"
    if config.num_warps not in (1, 2, 4, 8, 16):
        return f"num_warps is {config.num_warps}, expected 1, 2, 4, 8 or 16"
    if config.num_stages < 1:
        return f"num_stages is {config.num_stages}, expected at least 1"
    if capability not in SHARED_MEMORY:
        known = ", ".join(f"sm_{sm}" for sm in SHARED_MEMORY)
        return f"sm_{capability} is not among the architectures the table knows ({known})"
    stage = sum(blocks[a] * blocks[b] for a, b in _STAGE_TILES[operation]) * element_size
    # The last stage of the pipeline is consumed from registers or overwritten in place.
    needed = stage * max(config.num_stages - 1, 1)
    if needed > SHARED_MEMORY[capability]:
        return (
            f"{needed} bytes of shared memory, more than the {SHARED_MEMORY[capability]} "
            f"that sm_{capability} gives a block"
        )
    accumulators = sum(blocks[a] * blocks[b] for a, b in _ACCUMULATORS[operation])
    registers = accumulators // (32 * config.num_warps)
    if registers > 192:
        return f"{registers} registers a thread for the accumulators alone, of 255 that there are"
    return None


_C = LaunchConfig
TABLE: dict[str, tuple[tuple[int, int, LaunchConfig], ...]] = {
    #                                  m    n   k    r  warps stages
    "shrink": (
        (2, 16, _C(64, 16, 64, 16, 4, 3)),
        (2, 32, _C(64, 16, 128, 32, 4, 3)),
        (2, 64, _C(64, 16, 64, 64, 4, 3)),
        (2, 128, _C(64, 16, 64, 128, 8, 3)),
        (2, 256, _C(64, 16, 32, 256, 8, 3)),
        (4, 16, _C(32, 16, 64, 16, 4, 3)),
        (4, 32, _C(32, 16, 64, 32, 4, 3)),
        (4, 128, _C(64, 16, 32, 128, 8, 3)),
    ),
    "linear_expand": (
        (2, 16, _C(128, 128, 32, 16, 8, 3)),
        (2, 32, _C(128, 128, 32, 32, 8, 3)),
        (2, 64, _C(128, 128, 32, 64, 8, 3)),
        (4, 16, _C(64, 64, 16, 16, 8, 3)),
    ),
    "expand_backward": (
        (2, 16, _C(64, 128, 16, 16, 4, 3)),
        (2, 32, _C(64, 128, 16, 32, 4, 3)),
        (2, 64, _C(64, 128, 16, 64, 8, 3)),
        (2, 128, _C(64, 64, 16, 128, 8, 2)),
        (4, 16, _C(32, 64, 16, 16, 4, 3)),
        (4, 32, _C(32, 32, 16, 32, 4, 3)),
        (4, 64, _C(16, 64, 16, 64, 4, 3)),
    ),
    "shrink_backward": (
        (2, 16, _C(64, 16, 64, 16, 4, 3)),
        (2, 32, _C(64, 16, 128, 32, 4, 3)),
        (2, 64, _C(64, 16, 128, 64, 8, 3)),
        (2, 128, _C(64, 16, 64, 128, 8, 3)),
        (4, 16, _C(32, 16, 64, 16, 4, 3)),
        (4, 32, _C(32, 16, 64, 32, 8, 3)),
        (4, 64, _C(16, 16, 64, 64, 8, 3)),
    ),
}


def config_for(operation: str, rank: int, element_size: int) -> LaunchConfig:
    """The row of ``TABLE`` that serves this call; the largest of the dtype beyond its last rank."""
    rows = [(most, config) for size, most, config in TABLE[operation] if size == element_size]
    for most, config in rows:
        if rank <= most:
            return config
    return rows[-1][1]


def chunks(processors: int, length: int, block: int, programs: int) -> tuple[int, int]:
    """Cuts ``length`` so that ``programs`` times the number of chunks fills ``processors``.

    Returns the number of chunks and how many blocks each has. Depends on shapes and device alone, so
    that two runs reduce in the same order.
    """
    blocks = -(-length // block)
    # Two waves, and at least four blocks a chunk: below that the partial sums cost more than they save.
    wanted = min(-(-2 * processors // programs), max(blocks // 4, 1))
    chunk = max(-(-blocks // wanted), 1)
    return max(-(-blocks // chunk), 1), chunk
