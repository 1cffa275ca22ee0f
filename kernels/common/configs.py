"""How kernels are launched: configurations, which of them are valid, how a length is cut into shares.

The configurations that ship are in ``kernels/tables``, one file an architecture.
"""

from dataclasses import dataclass

SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Compute capability → bytes of shared memory that one CTA may use."""
GROUP_M = 8
"""Row blocks in a group of GEMM tiles. CTAs that run together read the same tiles of W from L2."""
INTERPRETER_SMS = 4
"""SMs of Triton's interpreter, which runs CTAs one by one: a few, so that K is cut as on a device."""
INTERPRETER_CAPABILITY = 90
"""Triton's interpreter takes the configurations of this compute capability."""
_TMA = (90, 100, 120)
_LARGEST_BLOCK = 1 << 16
"""A tile of Triton's has at most 2**20 elements, and each side at least 16."""
_MOST_STAGES, _MOST_PROGRAMS = 32, 32


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched.

    A tile has ``block_m`` rows, ``block_n`` output columns, ``block_k`` columns of the contracted
    dimension and ``block_r`` columns of the rank. An operation ignores those that it doesn't have.
    ``num_warps`` and ``num_stages`` are Triton's; ``ctas_per_sm`` programs run on an SM at once. The
    rest is for ``linear_expand`` and a layer's forward:

    - ``descriptors``: load and store by TMA, where the layout of the matrices allows it;
    - ``flatten``: the loads of the next tile begin before this one is written;
    - ``parts``: a tile is written in this many parts of its columns, in ``masked_parts`` if there is a
      dropout mask, which is made in as many;
    - ``helpers``: programs of a layer's forward that shrink x beside the GEMM, where that pays;
    - ``hybrid``: no fused kernel, but ``expand`` in these tiles and PyTorch's GEMM onto what it wrote.
    """

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    flatten: bool = False
    parts: int = 1
    masked_parts: int = 1
    ctas_per_sm: int = 1
    helpers: int = 0
    hybrid: bool = False

    @property
    def options(self) -> dict[str, object]:
        """What a launch passes to the compiler."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            # Said outright because its default changes with Triton 3.10.
            "enable_fp_fusion": True,
        }


# The operand tiles (rows, columns) that one pipeline stage holds in shared memory.
_STAGE_TILES = {
    "shrink": (("block_m", "block_k"), ("block_r", "block_k")),
    "expand": (("block_m", "block_r"), ("block_n", "block_r")),
    "linear_expand": (("block_m", "block_k"), ("block_n", "block_k")),
    "expand_backward": (("block_m", "block_n"), ("block_m", "block_r")),
    "shrink_backward": (("block_m", "block_k"), ("block_m", "block_r")),
}
# The float32 accumulators (rows, columns) that a CTA keeps in registers.
_ACCUMULATORS = {
    "shrink": (("block_m", "block_r"),),
    "expand": (("block_m", "block_n"),),
    "linear_expand": (("block_m", "block_n"),),
    "expand_backward": (("block_m", "block_r"), ("block_n", "block_r")),
    "shrink_backward": (("block_r", "block_k"),),
}
OPERATIONS = tuple(_STAGE_TILES)


def why_invalid(
    operation: str, config: LaunchConfig, element_size: int, capability: int
) -> str | None:
    """The reason for which ``config`` can't serve ``operation`` on this architecture, or None.

    ``element_size``: bytes of an activation; ``capability``: the compute capability as in ``sm_90``.
    Shared memory and registers are counted from below. A configuration that is refused would certainly
    fail; one that passes may still be too large, which compiling it tells.
    """
    if config.hybrid:
        if operation != "linear_expand":
            return f"hybrid is a way to do linear_expand, and this is {operation}"
        operation = "expand"
    blocks = {name: getattr(config, name) for name in ("block_m", "block_n", "block_k", "block_r")}
    for name, size in blocks.items():
        if not 16 <= size <= _LARGEST_BLOCK or size & (size - 1):
            return f"{name} is {size}: tl.dot needs powers of two of at least 16, up to {_LARGEST_BLOCK}"
    if config.num_warps not in (1, 2, 4, 8, 16):
        return f"num_warps is {config.num_warps}, expected 1, 2, 4, 8 or 16"
    if not 1 <= config.num_stages <= _MOST_STAGES:
        return f"num_stages is {config.num_stages}, expected 1 to {_MOST_STAGES}"
    for name in ("parts", "masked_parts"):
        parts = getattr(config, name)
        if parts not in (1, 2, 4, 8) or config.block_n // parts < 16:
            return f"{name} is {parts}, expected 1, 2, 4 or 8, of at least 16 columns each"
    if not 1 <= config.ctas_per_sm <= _MOST_PROGRAMS:
        return f"ctas_per_sm is {config.ctas_per_sm}, expected 1 to {_MOST_PROGRAMS}"
    if config.helpers < 0:
        return f"helpers is {config.helpers}, expected 0 or more"
    if capability not in SHARED_MEMORY:
        known = ", ".join(f"sm_{sm}" for sm in SHARED_MEMORY)
        return f"sm_{capability} is not among the architectures the table knows ({known})"
    if config.descriptors and capability not in _TMA:
        return f"descriptors need TMA, which sm_{capability} lacks"
    if config.descriptors and max(config.block_m, config.block_n, config.block_k) > 256:
        return "TMA takes at most 256 rows or columns"
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


def chunks(sms: int, length: int, block: int, programs: int) -> tuple[int, int]:
    """Cuts ``length`` into chunks: so many that ``programs`` CTAs for each fill ``sms`` SMs.

    Returns the number of chunks, and the blocks of ``block`` elements in each. It depends on shapes and
    the device alone, so two runs reduce in the same order.
    """
    blocks = -(-length // block)
    # At least four blocks a chunk: below that the partial sums cost more than they save.
    wanted = min(max(sms // max(programs, 1), 1), max(blocks // 4, 1))
    chunk = max(-(-blocks // wanted), 1)
    return max(-(-blocks // chunk), 1), chunk


def split_k(sms: int, tiles: int, k_blocks: int) -> int:
    """The number of shares into which K is cut, so that the ``tiles`` of a GEMM fill ``sms`` SMs: 1, 2,
    4 or 8, each of at least four blocks."""
    splits = 1
    while splits < 8 and 2 * splits * tiles <= sms and 8 * splits <= k_blocks:
        splits *= 2
    return splits
