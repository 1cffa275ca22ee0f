"""What runs the distributed tests: it gathers, and a failing or dead rank ends a run."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, on_ranks


def _sum(rank: int, factor: int) -> tuple[int, float]:
    total = torch.tensor(float(rank * factor))
    dist.all_reduce(total)
    return rank, total.item()


def _second_raises(rank: int) -> None:
    if rank == 1:
        raise ValueError("no such adapter")
    dist.barrier()


def _second_dies(rank: int) -> None:
    if rank == 1:
        os._exit(9)
    dist.barrier()


def _sleeps(rank: int) -> None:
    time.sleep(60)


def test_every_rank_answers():
    assert on_ranks(_sum, 3, world=3) == [(0, 9.0), (1, 9.0), (2, 9.0)]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_second_raises, "no such adapter"),
        (_second_dies, "rank . died|Connection"),
        (_sleeps, "in time"),
    ],
)
def test_a_failing_rank_ends_the_run(function, message):
    began = time.monotonic()
    with pytest.raises(RankError, match=message):
        on_ranks(function, seconds=1 if function is _sleeps else 30)
    assert time.monotonic() - began < 20
