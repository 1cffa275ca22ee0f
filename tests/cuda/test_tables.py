"""What Python and C++ both say of a kernel's tiles: neither may be changed alone."""

import re

import pytest
import timeline
from launchers import CSRC

from lorafast.backends.cuda import gemm, linear_expand, wgmma, wgmma_backward
from lorafast.backends.cuda.tables import LINEAR_EXPAND, ROWS, WGMMA


def found(file: str, pattern: str) -> list[tuple[str, ...]]:
    """The groups of a pattern, wherever it is in a source."""
    at = [match.groups() for match in re.finditer(pattern, (CSRC / file).read_text())]
    assert at, f"{file} has no {pattern}"
    return at


def numbers(file: str, pattern: str) -> tuple[int, ...]:
    """Those of its only place."""
    (groups,) = found(file, pattern)
    return tuple(map(int, groups))


@pytest.mark.parametrize("row", WGMMA.values())
def test_tiles_of_wgmma(row):
    rows, depth = numbers("sm90_ring.cuh", r"int kM = (\d+), kN = kN_, kK = (\d+);")
    assert (rows, depth) == (ROWS, row.depth)
    columns, wide, narrow = numbers("sm90_ring.cuh", r"kStages = kN == (\d+) \? (\d+) : (\d+);")
    assert {tile.columns: tile.stages for tile in row.tiles} == {columns: wide, 128: narrow}
    allowed = numbers("sm90_launch.cuh", r"columns == (\d+) \|\| columns == (\d+)")
    assert sorted(allowed) == sorted(row.columns())
    allowed = numbers("sm90_launch.cuh", r"cluster == (\d+) \|\| cluster == (\d+)")
    assert sorted(allowed) == sorted(row.clusters)


def test_tiles_of_a_backward_by_wgmma():
    (columns,) = numbers("lora_linear_backward_sm90.cu", r"kBackwardColumns = (\d+);")
    assert columns == wgmma_backward._COLUMNS
    assert all(columns in row.columns() for row in WGMMA.values())
    (step,) = numbers("sm90_gradients.cuh", r"int kColumns = (\d+), kWarps = \d+;")
    assert step == wgmma_backward._STEP
    (warps,) = numbers("sm90_gradients.cuh", r"int kColumns = \d+, kWarps = (\d+);")
    assert warps == wgmma_backward._WARPS


def test_masks_that_wait_for_the_last_tile():
    assert numbers("sm90.cuh", r"kPatient = (\d+);") == (timeline.PATIENT,)


def test_counters_of_wgmma():
    ((names,),) = found("sm90_ring.cuh", r"enum \{ ([\w, ]+), kSm90Flags \};")
    assert len(names.split(", ")) == wgmma.COUNTERS


def test_tiles_of_mma_sync():
    tiles = {
        int(columns): (int(rows), int(resident))
        for rows, columns, resident in found(
            "linear_expand.cu", r"= GemmTile<(\d+), (\d+), \d+, (\d+)>;"
        )
    }
    assert tiles
    for row in LINEAR_EXPAND.values():
        for tile in row:
            assert tiles[tile.columns] == (ROWS, tile.resident)
    assert tiles.keys() == {tile.columns for tile in LINEAR_EXPAND[80]}


def test_ranks_and_terms():
    (bits,) = numbers("gemm_arguments.h", r"kRanksEnd = INT64_C\(1\) << (\d+);")
    assert 2**bits - 1 == gemm._MOST_RANKS
    for file, limits in (
        ("linear_expand.cu", linear_expand._GEMM),
        ("sm90_launch.cuh", wgmma._GEMM),
    ):
        (bits,) = numbers(file, r"check_gemm\([\w, ]+, INT64_C\(1\) << (\d+)\)")
        assert limits.terms[1] == 2**bits - 1
