"""How the CUDA C++ kernels are launched on each architecture: one table a family, by compute capability.

An architecture that a table lacks is served as the newest one before it. No row was timed: they follow
from the sizes of the chips and from what the kernels execute (tests/ptx).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

Row = TypeVar("Row")


def row_of(table: Mapping[int, Row], capability: int) -> Row:
    """That of an architecture."""
    return table[max((known for known in table if known <= capability), default=min(table))]


# ---- Skinny operations (skinny.py)


@dataclass(frozen=True)
class SkinnyRow:
    """``shared``: bytes of shared memory of a CTA at most; ``on_sm``: of all CTAs of an SM, each of
    which takes 1 KB more. ``in_flight``: bytes that an SM asks memory for ahead of their use.

    ``ring``: whether tiles come by cp.async, through a ring of several stages. Without, a CTA has one
    tile in shared memory and the next one on its way in registers."""

    shared: int
    on_sm: int
    in_flight: int
    ring: bool = True


SKINNY = {
    75: SkinnyRow(64 << 10, 64 << 10, 8 << 10, ring=False),
    80: SkinnyRow(163 << 10, 164 << 10, 64 << 10),
    86: SkinnyRow(99 << 10, 100 << 10, 24 << 10),
    90: SkinnyRow(227 << 10, 228 << 10, 96 << 10),
    120: SkinnyRow(99 << 10, 100 << 10, 32 << 10),
}


# ---- decode.py: layers of at most 16 rows in one launch


@dataclass(frozen=True)
class DecodeRow:
    """``resident``: CTAs that an SM has registers for, of up to 8 rows of x, and of up to 16
    (``resident_16``), in 16 bits; in float32 it is one. ``helpers``: at most, about one an SM.

    How long ``s`` takes to be there, none of it measured: ``load``: seconds from the first load of a
    CTA to its data, from memory that is busy; ``trip``: there and back through L2, with the barrier or
    the fence that goes with it; ``l2``: bytes a second that an SM gets from L2 while all ask, 32 a
    clock."""

    resident: int
    resident_16: int
    helpers: int
    load: float
    trip: float
    l2: float


DECODE = {
    75: DecodeRow(1, 1, 128, 0.6e-6, 0.3e-6, 32 * 1.59e9),
    80: DecodeRow(2, 1, 128, 0.6e-6, 0.3e-6, 32 * 1.41e9),
    86: DecodeRow(2, 1, 128, 0.6e-6, 0.3e-6, 32 * 1.70e9),
    90: DecodeRow(2, 1, 128, 0.6e-6, 0.3e-6, 32 * 1.83e9),
}


# ---- small.py: expand, and whole layers in one launch


@dataclass(frozen=True)
class Small:
    """``expand``: the warps of a CTA side by side, of 32 columns each, and the CTAs that an SM holds by
    its registers, for bfloat16 and for products in TF32. ``lora_linear``: the stages of its ring, and
    the bytes of shared memory that a CTA may have."""

    column_warps: int
    resident: int
    resident_tf32: int
    stages: int
    shared: int


SMALL = {
    75: Small(4, 2, 2, 3, 65_536),
    80: Small(4, 3, 2, 3, 166_912),
    86: Small(4, 2, 2, 3, 101_376),
    89: Small(4, 2, 2, 3, 101_376),
    90: Small(4, 3, 2, 3, 232_448),
    100: Small(4, 3, 2, 3, 232_448),
    120: Small(4, 2, 2, 3, 101_376),
}


# ---- Fused GEMMs

ROWS = 128
"""Of a tile of y, in all of them."""

# ---- linear_expand.py


@dataclass(frozen=True)
class GemmTile:
    """128 rows and ``columns`` of y, of which an SM holds ``resident`` CTAs by registers and shared
    memory: one fills its ring, or stores y, while the other multiplies. ``rate``: the share of the rate
    of PyTorch's large GEMMs that their main loops reach. It is assumed: what is executed
    (tests/cuda/linear_expand_counts.py) leaves tensor cores busy for 97 % of a tile and more, but on
    sm_80 narrow tiles take half of what L2 can give, wide ones 38 %."""

    columns: int
    resident: int
    rate: float


_NARROW = GemmTile(128, 2, 0.9)
LINEAR_EXPAND = {
    80: (GemmTile(256, 1, 0.9), GemmTile(128, 2, 0.85)),
    86: (_NARROW,),
    89: (_NARROW,),
    120: (_NARROW,),
}
"""The wide tile has 144 KB of shared memory, the narrow one 48 KB."""


# ---- wgmma.py: GEMMs with the low-rank term inside, by wgmma


@dataclass(frozen=True)
class WgmmaTile:
    """128 rows and ``columns`` of y, from a ring of ``stages`` K blocks in shared memory. ``clocks``: in
    which tensor cores multiply a K block. Assumed, not measured, beyond what wide tiles must take: by
    column a narrow one takes 1.1 of that."""

    columns: int
    stages: int
    clocks: float


@dataclass(frozen=True)
class Wgmma:
    """``tiles``, and ``clusters``: how many CTAs share what they load of W. ``depth``: elements of a K
    block. ``group``: row blocks whose tiles run together. Assumed, not measured: ``helper_bytes``, those
    of x that a helper reads in a clock beside the GEMM; ``l2``, the bytes that an SM gets from L2 in a
    clock while all ask (the 5,120 of the whole of A100's, for 132), and ``l2_port`` alone."""

    tiles: tuple[WgmmaTile, ...]
    clusters: tuple[int, ...]
    depth: int
    group: int
    helper_bytes: float
    l2: float
    l2_port: float

    def columns(self) -> tuple[int, ...]:
        """Of the tiles that there are."""
        return tuple(tile.columns for tile in self.tiles)

    def tile(self, columns: int) -> WgmmaTile:
        """The one with so many."""
        return next(tile for tile in self.tiles if tile.columns == columns)


WGMMA = {
    90: Wgmma(
        tiles=(WgmmaTile(256, 4, 1024.0), WgmmaTile(128, 6, 1.1 * 512.0)), clusters=(2, 1), depth=64,
        group=16, helper_bytes=36.0, l2=38.8, l2_port=64.0,
    ),
}  # fmt: skip
"""Of these architectures alone: no other has the instruction."""
