import dataclasses

import pytest

pytest.importorskip("triton")

from lorafast.kernels.common.configs import (
    OPERATIONS,
    SHARED_MEMORY,
    TABLE,
    LaunchConfig,
    config_for,
    why_invalid,
)

ROWS = [(op, size, rank, config) for op in OPERATIONS for size, rank, config in TABLE[op]]
GOOD = LaunchConfig(64, 64, 32, 16, num_warps=4, num_stages=3)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize(("op", "size", "rank", "config"), ROWS, ids=lambda v: str(v)[:15])
def test_every_row_is_valid_everywhere(op, size, rank, config, capability):
    assert why_invalid(op, config, size, capability) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_m": 48}, "block_m is 48: tl.dot needs powers of two of at least 16"),
        ({"block_r": 8}, "block_r is 8"),
        ({"num_warps": 3}, "num_warps is 3, expected 1, 2, 4, 8 or 16"),
        ({"num_stages": 0}, "num_stages is 0, expected at least 1"),
        ({"block_k": 1024}, "bytes of shared memory, more than the 101376 that sm_86"),
        ({"block_m": 256, "block_n": 256, "block_k": 16}, "registers a thread"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_what_is_wrong_is_said(change, reason):
    config = dataclasses.replace(GOOD, **change)
    assert reason in why_invalid("linear_expand", config, 2, 86)


def test_an_unknown_architecture_is_said():
    assert "sm_75 is not among" in why_invalid("shrink", GOOD, 2, 75)


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("size", [2, 4])
def test_the_smallest_row_that_holds_the_rank_is_taken(op, size):
    ranks = [rank for s, rank, _ in TABLE[op] if s == size]
    assert ranks == sorted(ranks)
    for rank in range(1, 257):
        taken = config_for(op, rank, size)
        fitting = [r for r in ranks if r >= rank]
        expected = min(fitting) if fitting else max(ranks)
        assert taken is next(c for s, r, c in TABLE[op] if s == size and r == expected)
