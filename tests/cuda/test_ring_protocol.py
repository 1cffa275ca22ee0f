"""Every interleaving of the model of csrc/cuda/sm90.cuh's protocol: right, and broken in each way."""

import pytest
from ring_protocol import BrokenError, Protocol, check

RIGHT = {
    "two stages": Protocol(stages=2, tiles=3, k_steps=2),
    "under a mask": Protocol(stages=2, tiles=3, k_steps=2, masked=True),
    "more ranks than stages": Protocol(stages=2, tiles=2, k_steps=1, rank_steps=3),
    "no ranks": Protocol(stages=2, tiles=3, rank_steps=0),
    "two warpgroups": Protocol(stages=2, tiles=2, k_steps=1, consumers=2),
}
LARGE = {
    "two CTAs": Protocol(stages=2, ctas=2, tiles=3, k_steps=1),
    "helpers": Protocol(stages=2, ctas=2, tiles=1, k_steps=2, helpers=1),
    "everyone helps": Protocol(stages=2, ctas=2, tiles=1, k_steps=2, helpers=2),
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
]


@pytest.mark.parametrize("protocol", BROKEN, ids=lambda protocol: protocol.broken)
def test_broken(protocol):
    with pytest.raises(BrokenError) as broken:
        check(protocol)
    print(f"{protocol.broken}: {broken.value}")
