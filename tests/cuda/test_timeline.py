"""The timeline of a tile, where arithmetic says what it must be."""

import itertools
from dataclasses import replace

import pytest
from timeline import Assumed, Cta, Tile, timeline

NOTHING = Assumed(
    instruction=0, l2=1e9, copy=0, load=0, products=0, wake=0, meet=0, fence=0, store=0
)
"""What tensor cores don't do takes no time."""
PRODUCTS = 64 * 8 * 128
"""Clocks of those of a tile."""
PLAIN = Tile(k_steps=64, rank_steps=0, bytes=49152)
RANKED = replace(PLAIN, rank_steps=1, substeps=1, write=200, trips=1)


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("free", [False, True])
def test_of_whatever_takes_no_time_only_products_are_left(in_turn, free):
    assumed = replace(NOTHING if free else Assumed(), in_turn=in_turn)
    found = timeline(PLAIN, assumed)
    assert found.busy == pytest.approx(PRODUCTS, rel=2e-3)
    assert found.tile - found.busy == pytest.approx(sum(found.idle.values()), abs=1)
    if free:
        # A warp issues no more than an instruction a clock, whatever is assumed.
        few = replace(PLAIN, step=0, begin=0, piece=0, load=0, begin_write=0)
        assert timeline(few, assumed).tile == pytest.approx(PRODUCTS)
        assert timeline(few, assumed).idle == {}


def test_ranks_take_their_products():
    few = replace(
        RANKED, step=0, begin=0, piece=0, load=0, begin_write=0, rank=0, write=0, substeps=4
    )
    assert timeline(few, NOTHING).tile == pytest.approx(PRODUCTS + 2 * 4 * 128)


def test_l2_bounds_a_tile_that_it_can_not_feed():
    """48 KB a step at 32 bytes a clock are 1,536 clocks for 1,024 of products."""
    found = timeline(PLAIN, Assumed(l2=32))
    assert found.tile == pytest.approx(64 * 49152 / 32, rel=0.01)
    assert max(found.idle, key=found.idle.get) == "waits for loads"
    multicast = timeline(replace(PLAIN, bytes=32768), Assumed(l2=39))
    assert multicast.tile == pytest.approx(timeline(PLAIN).tile, rel=2e-3)


def test_loads_one_after_another_are_bare():
    """The ring has room for four stages, so that a grant comes less than four steps ahead."""
    short = timeline(RANKED)
    assert "waits for ranks" not in short.idle
    long = timeline(replace(RANKED, trips=33))
    bare = 33 * Assumed().load
    assert bare - 4 * 1024 < long.tile - short.tile < bare
    assert max(long.idle, key=long.idle.get) == "waits for ranks"


MASKED = replace(RANKED, mask=240, bits=4600)


def test_what_a_mask_keeps_is_added_behind_the_products():
    """Both warpgroups add at once: what each issues takes both one clock an instruction."""
    found, plain = timeline(replace(MASKED, mask=2400)), timeline(RANKED)
    assert 2 * 2400 * 0.8 < found.idle["masks"] < 2 * 2400 * 1.1
    assert found.tile - plain.tile < found.idle["masks"] + 500


def test_bits_are_made_while_a_tile_is_multiplied():
    """Two clocks an instruction: as long as nine K blocks of 1,024."""
    free = timeline(replace(MASKED, bits=0))
    assert timeline(MASKED).tile == pytest.approx(free.tile, abs=16)
    assert timeline(MASKED).first == pytest.approx(free.first)
    short = timeline(replace(MASKED, k_steps=4))
    assert short.tile > 2 * MASKED.bits
    assert max(short.idle, key=short.idle.get) == "waits for the mask"


def test_a_first_tile_waits_for_memory_and_the_last_for_its_stores():
    found = timeline(PLAIN)
    assert found.first > Assumed().copy + PLAIN.bytes / Assumed().l2
    assert found.last > 4 * (PLAIN.piece * Assumed().instruction + Assumed().fence)


@pytest.mark.parametrize("longer", ["copy", "load", "wake", "meet", "fence", "store", "products"])
def test_what_takes_longer_makes_no_tile_shorter(longer):
    tile = replace(RANKED, trips=6)
    times = [
        timeline(tile, replace(Assumed(), **{longer: factor * getattr(Assumed(), longer)})).tile
        for factor in (1, 2, 4, 8)
    ]
    assert all(after >= before * 0.995 for before, after in itertools.pairwise(times))
    assert times[-1] > times[0]


def test_a_lead_of_one_warpgroup_covers_some_of_its_epilogue():
    """Of two K blocks; the ring has no room for more, and then it is lost."""
    bare, led, far = (timeline(replace(RANKED, skew=n)).tile for n in (0, 2, 4))
    assert led < bare - 256
    assert far == pytest.approx(bare, rel=1e-3)


def test_a_role_that_never_ends_is_told():
    cta = Cta(replace(RANKED, stages=1, rank_steps=0), Assumed(), 2)
    cta.empty[0].arrivals = 3
    with pytest.raises(RuntimeError, match="warpgroup 0 ends 0 of 2 tiles"):
        cta.run()
