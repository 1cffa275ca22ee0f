"""Every interleaving of the model of csrc/cuda/sm90.cuh's protocol: right, and broken in each way."""

import pytest
from ring_protocol import BrokenError, Protocol, check

PAIR = {"ctas": 2, "cluster": 2}
HELP = {**PAIR, "tiles": 2, "helpers": 1}
RIGHT = {
    "two stages": Protocol(stages=2, tiles=3, k_steps=2),
    "under a mask": Protocol(stages=2, tiles=3, k_steps=2, masked=True),
    "more ranks than stages": Protocol(stages=2, tiles=2, k_steps=1, rank_steps=3),
    "no ranks": Protocol(stages=2, tiles=3, rank_steps=0),
    "two warpgroups": Protocol(stages=2, tiles=2, k_steps=1, consumers=2),
    "a cluster": Protocol(stages=2, **PAIR, tiles=1, k_steps=1, rank_steps=0),
}
LARGE = {
    "two CTAs": Protocol(stages=2, ctas=2, tiles=3, k_steps=1),
    "helpers": Protocol(stages=2, ctas=2, tiles=1, k_steps=2, helpers=1),
    "everyone helps": Protocol(stages=2, ctas=2, tiles=1, k_steps=2, helpers=2),
    "a cluster's tiles": Protocol(stages=2, **PAIR, tiles=3, k_steps=1),
    "a cluster that helps": Protocol(stages=2, **HELP, k_steps=1),
    "a cluster under a mask": Protocol(stages=2, **PAIR, tiles=1, k_steps=1, masked=True),
}


@pytest.mark.parametrize("which", RIGHT)
def test_right(which):
    assert check(RIGHT[which]) > 100


@pytest.mark.slow
@pytest.mark.parametrize("which", LARGE)
def test_right_at_length(which):
    states = check(LARGE[which])
    print(f"{which}: {states:,} states")


BROKEN = [
    Protocol(stages=4, tiles=5, k_steps=1, rank_steps=0, broken="posts unseen"),
    Protocol(tiles=2, k_steps=2, rank_steps=2, broken="grants unseen"),
    Protocol(tiles=2, k_steps=4, broken="waits for stages alone"),
    Protocol(tiles=1, k_steps=4, broken="releases early"),
    Protocol(tiles=1, k_steps=3, broken="reads unseen"),
    Protocol(ctas=2, tiles=1, k_steps=1, helpers=1, broken="raises early"),
    Protocol(ctas=2, tiles=1, k_steps=1, helpers=1, broken="counted by the loader"),
    Protocol(**PAIR, tiles=1, k_steps=3, broken="tells itself"),
    Protocol(**PAIR, tiles=2, k_steps=2, broken="tells the leader"),
    Protocol(**PAIR, tiles=2, k_steps=2, broken="hears of one CTA"),
    Protocol(**PAIR, tiles=1, k_steps=1, broken="expects its own"),
    Protocol(**PAIR, tiles=1, k_steps=1, broken="posts to itself"),
    Protocol(**PAIR, tiles=2, k_steps=1, broken="loads unasked"),
    Protocol(**PAIR, tiles=3, k_steps=1, broken="takes for itself"),
    Protocol(**PAIR, tiles=3, k_steps=1, broken="counts its own readers"),
    Protocol(**PAIR, tiles=1, k_steps=1, broken="leaves alone"),
    Protocol(**HELP, k_steps=1, broken="grants before it expects"),
    Protocol(**HELP, k_steps=1, broken="expects and arrives"),
    Protocol(**HELP, k_steps=1, broken="expects the other's x"),
    Protocol(**HELP, k_steps=3, broken="loads items unseen"),
    Protocol(**HELP, k_steps=3, broken="writes ungranted"),
    Protocol(**HELP, k_steps=3, broken="forgets a grant"),
    Protocol(**HELP, k_steps=1, broken="takes tiles first"),
    Protocol(**PAIR, tiles=1, k_steps=1, helpers=1, broken="raises early"),
    Protocol(**HELP, k_steps=3, broken="tells itself"),
]


@pytest.mark.parametrize("protocol", BROKEN, ids=lambda protocol: protocol.broken)
def test_broken(protocol):
    with pytest.raises(BrokenError) as broken:
        check(protocol)
    print(f"{protocol.broken}: {broken.value}")
