"""Counts of the GEMMs of wgmma, and what a low-rank term adds to a tile by the timeline of it."""

import pytest

pytest.importorskip("triton")

from on_machine import needs_nvcc
from timeline import Assumed, timeline

from ptx import cuda_counts, sm90_counts
from ptx.cuda_launch import Subject, Whole, bare, trips, whole_of, without_polls
from ptx.launch import Count

pytestmark = needs_nvcc

LAYER = (8192, 4096, 4096)
MOST_ADDED, LEAST_BUSY = 0.02, 0.97
MOST_MASKED, LEAST_MASKED = 0.015, 0.965
"""Of a tile at r = 16 and K = 4096."""
FEWEST, MOST = 1.6, 2.6
"""Clocks of a warp for an instruction of PTX."""
ASSUMED = [
    Assumed(), Assumed(in_turn=False), Assumed(load=700), Assumed(copy=900), Assumed(store=700),
    Assumed(instruction=MOST),
]  # fmt: skip


def whole(operation="linear_expand", variant="forward", r=16, dropout=False, layer=LAYER):
    found = whole_of(Subject(operation, "wgmma", (*layer, r), dropout, variant), 90)
    assert isinstance(found, Whole), found
    return found


def hold_the_aims(of):
    tile = sm90_counts.tile_of(of)
    for assumed in ASSUMED:
        found, plain = (timeline(t, assumed) for t in (tile, sm90_counts.without_ranks(tile)))
        assert found.tile <= (1 + MOST_ADDED) * plain.tile, (assumed, found, plain)
        assert found.bound >= LEAST_BUSY, (assumed, found)


@pytest.mark.slow
def test_a_forward_adds_little_to_a_tile_that_tensor_cores_bound():
    hold_the_aims(whole())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "variant"), [("linear_expand", "dx"), ("lora_linear", "tile")]
)
def test_others_add_little_too(operation, variant):
    hold_the_aims(whole(operation, variant))


def test_a_row():
    of = whole()
    (row,) = sm90_counts.rows_of(of)
    columns, cluster = of.n["columns"], of.n.get("cluster", 1)
    tiles = 8192 // 128 * (4096 // columns)
    assert (row.backend, row.tiles, row.steps, row.from_l2) == ("cuda", tiles, 64, True)
    assert row.step.multiplies == 128 * columns * 64
    # x, and W or its half: the other half comes from the other CTA's copy.
    assert 32 * row.step.sectors == 128 * (128 + columns / cluster)
    assert row.step.conflicts == 0
    assert row.in_flight >= 40 << 10
    assert row.timeline["clocks"] >= row.cycles["tensor"] - 1
    # What the timeline assumes of an instruction of PTX, by ptxas' own stalls.
    stored = sm90_counts.parts(bare(of)).tile["stored"] / len(sm90_counts.CONSUMERS)
    assert FEWEST * stored < row.stalls["epilogue"] < MOST * stored
    assert 0 < row.stalls["step"] < 512, "a warp issues a step while the other warpgroup multiplies"


def test_a_tile_scaled_is_whole():
    """One CTA with two tiles of 16 steps, executed: the program, and twice the tile and its steps."""
    of = whole()
    cluster, columns = of.n.get("cluster", 1), of.n["columns"]
    parts = sm90_counts.parts(of)
    found = of.part(M=128 * cluster, N=3 * columns, K=16 * 64, ctas=cluster).times(1 / cluster)
    scaled = parts.program.plus(parts.tile, 3).plus(parts.step, 3 * 16)
    for name in ("its multiplies", "its sectors", "tensor", "copied"):
        assert scaled[name] == pytest.approx(found[name], rel=1e-9), name
    for role in ("warp 0", "warp 1", "warp 4", "warp 8"):
        # Lanes that part for an arrival meet again as it happens.
        assert scaled[role] == pytest.approx(found[role], rel=0.06, abs=20), role


def test_a_plain_gemm_has_no_low_rank_term():
    of = bare(whole())
    (row,) = cuda_counts.rows_of(of)
    assert (row.variant, row.r) == ("plain", 0)
    assert row.tile.multiplies == 0
    assert sm90_counts.tile_of(of).rank_steps == 0


@pytest.mark.slow
@pytest.mark.parametrize("r", [16, 64])
def test_a_mask_adds_little_to_a_tile(r):
    """The same launch without a mask: what is kept costs no more than one product in fifty."""
    masked, plain = (
        sm90_counts.tile_of(whole(variant="dx", r=r, dropout=masked)) for masked in (True, False)
    )
    assert masked.mask > 0 == plain.mask
    assert masked.bits > 4096 / 96 * 50, "a call of Philox has seven rounds"
    assert masked.rank == pytest.approx(plain.rank, rel=0.3)
    for assumed in ASSUMED:
        found, other = timeline(masked, assumed), timeline(plain, assumed)
        assert found.tile <= (1 + MOST_MASKED) * other.tile, (assumed, found, other)
        assert found.first == pytest.approx(other.first, rel=0.05), "bits aren't waited for"
        if r == 16:
            assert found.bound >= LEAST_MASKED, (assumed, found)


@pytest.mark.slow
def test_what_a_mask_keeps_is_predicated():
    """An FFMA an element, and no more than one instruction beside it: bits become predicates."""
    of = whole(variant="dx", dropout=True)
    elements = of.n["columns"] // 2
    assert elements < of.schedule.masked < 2 * elements


def count(line, opcode, *by_warp):
    return Count(line, opcode, sum(by_warp), 32 * sum(by_warp), 0, 0, 0, 0, by_warp)


WAITS = """mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], %r2;
@%p1 bra done;
bra again;
""".splitlines()


def test_a_poll_is_taken_for_a_wait_that_ends_at_once():
    counts = (
        count(1, "mbarrier.try_wait.parity.shared::cta.b64", 5, 2), count(2, "bra", 5, 2),
        count(3, "bra", 3, 0), count(4, "bra", 9, 9),
    )  # fmt: skip
    found = without_polls(counts)
    assert [c.by_warp for c in found] == [(2, 2), (2, 2), (0, 0), (9, 9)]
    assert [c.issued for c in found] == [4, 4, 0, 18]


ONE_BY_ONE = """ld.global.u32 %r1, [%rd1];
st.shared.u32 [%r9], %r1;
ld.global.u32 %r2, [%rd2];
st.shared.u32 [%r9], %r2;
""".splitlines()
TOGETHER = """ld.global.u32 %r1, [%rd1];
ld.global.u32 %r2, [%rd2];
st.shared.u32 [%r9], %r1;
st.shared.u32 [%r9], %r2;
""".splitlines()
BRANCHES = """ld.global.u16 %rs1, [%rd1];
cvt.u32.u16 %r1, %rs1;
add.u32 %r3, %r1, 1;
bra $next;
$next:
ld.global.u32 %r2, [%rd2];
add.u32 %r3, %r2, 1;
""".splitlines()
COPIES = """cp.async.cg.shared.global [%r1], [%rd1], 16;
cp.async.wait_group 0;
""".splitlines()


@pytest.mark.parametrize(
    ("lines", "expected"), [(ONE_BY_ONE, 10), (TOGETHER, 5), (BRANCHES, 10), (COPIES, 5)]
)
def test_trips_are_waits_for_what_was_loaded(lines, expected):
    counts = tuple(
        count(i + 1, line.split()[0], 5, 7) for i, line in enumerate(lines) if line[0] != "$"
    )
    assert trips(counts, lines, 0) == expected
