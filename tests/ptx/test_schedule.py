"""When programs end: by the kernel's own order of tiles, which the plan's model must agree with."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from hypothesis import given
from hypothesis import strategies as st
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.plan import forward_helpers, item_rounds, skinny_rounds
from lorafast.kernels.tables import find

from ptx.schedule import LOWEST_FIRST, SMS, schedule, tile_count, tile_of

CONFIG = LaunchConfig(128, 256, 64, 16, 8, 4, helpers=8)
SHRINK = LaunchConfig(64, 16, 128, 64, 4, 3)
ITEM = item_rounds(256, 2)


@st.composite
def launches(draw):
    tiles = draw(st.integers(0, 400))
    programs = draw(st.integers(2, 40))
    helpers = draw(st.integers(0, programs - 1))
    return tiles, programs, helpers, draw(st.integers(0, tiles // (programs - helpers)))


@given(launches())
def test_every_tile_has_one_program_and_helpers_come_last(launch):
    tiles, programs, helpers, waves = launch
    rounds = [tile_count(p, programs, tiles, waves, helpers) for p in range(programs)]
    firsts = [waves if p < helpers else 0 for p in range(programs)]
    found = [
        tile_of(turn, p, programs, waves, helpers)
        for p in range(programs) for turn in range(firsts[p], rounds[p])
    ]  # fmt: skip
    assert sorted(found) == list(range(tiles))
    others = rounds[helpers:]
    assert all(mine <= theirs for mine in rounds[:helpers] for theirs in others)
    assert max(rounds) - min(rounds) <= 1


@given(
    rows=st.integers(1, 200),
    cols=st.integers(1, 60),
    helpers=st.integers(1, 100),
    sms=st.sampled_from([20, 108, 116, 132]),
)
def test_the_plan_ends_when_the_schedule_does(rows, cols, helpers, sms):
    """But for what programs wait for flags, and for memory, of which the schedule knows nothing."""
    config = replace(CONFIG, helpers=helpers)
    planned = forward_helpers(config, SHRINK, 128 * rows, 4096, 256 * cols, 16, 2, False, sms)
    if planned is None:
        return
    most = -(-rows // helpers)
    found = schedule(
        rows, cols, sms, item=skinny_rounds(config, rows, 2, sms) / most, helpers=helpers,
        waves=planned.waves,
    )  # fmt: skip
    assert sum(found.tiles) == rows * cols
    # A helper that has an item less may have a tile more, and end no later.
    assert found.end <= planned.rounds + found.waited + 1e-9
    assert planned.rounds - 1 < found.end


def test_the_shipped_helpers_cost_no_round_and_keep_nobody_waiting():
    config = find("linear_expand", 90, torch.bfloat16, 8192, 4096, 4096, 16, True)
    for M, N in ((8192, 4096), (8192, 14336), (4096, 4096), (16384, 4096)):
        planned = forward_helpers(config, SHRINK, M, 4096, N, 16, 2, False, SMS)
        rows, cols = M // 128, N // 256
        found = schedule(rows, cols, SMS, item=ITEM, helpers=planned.helpers, waves=planned.waves)
        assert (found.end, found.waited) == (planned.rounds, 0.0)
        assert planned.rounds == planned.alone == schedule(rows, cols, SMS).end


SERVED = [
    (shape, helpers, item)
    for shape in [(64, 16), (64, 56), (32, 16), (33, 16), (128, 4), (64, 4), (64, 8)]
    for helpers in (8, 16, 32, 64)
    for item in (0.31, ITEM)
    if 2 * item * -(-shape[0] // helpers) <= -(-shape[0] * shape[1] // SMS)
]


@pytest.mark.parametrize(("shape", "helpers", "item"), SERVED)
def test_who_has_the_last_round_matters_unless_waves_are_chosen_for_it(shape, helpers, item):
    """To begin it with the helpers is as good, if they miss a round more."""

    def best(**order):
        return min(
            schedule(*shape, SMS, item=item, helpers=helpers, waves=waves, **order).end
            for waves in range(shape[0] * shape[1] // (SMS - helpers) + 1)
        )

    assert best() == pytest.approx(best(**LOWEST_FIRST))


def test_helpers_that_begin_the_last_round_end_after_all_others():
    shape = (64, 16, SMS)
    last = schedule(*shape, item=0.31, helpers=8, waves=2)
    first = schedule(*shape, item=0.31, helpers=8, waves=2, **LOWEST_FIRST)
    assert last.end == max(last.ends[8:]) == 8
    assert first.end == max(first.ends[:8]) > 8.4
    assert max(first.ends[8:]) == 8


@pytest.mark.parametrize("waves", [1, 2])
@pytest.mark.parametrize("helpers", range(4, 131))
def test_two_rounds_of_tiles_have_no_room_for_one_that_helpers_miss(helpers, waves):
    """(8192, 4096 -> 1024): 256 tiles for 264 places."""
    assert schedule(64, 4, SMS, item=0.31, helpers=helpers, waves=waves).end >= 3


@pytest.mark.parametrize(("shape", "alone"), [((64, 16), 8), ((64, 56), 28), ((64, 4), 2)])
def test_on_fewer_sms_than_programs_a_launch_takes_nearly_twice_as_long(shape, alone):
    """The last programs begin when others have ended."""
    beside = SMS - 16
    assert schedule(*shape, SMS).end == alone
    assert schedule(*shape, SMS, resident=beside).end >= 2 * alone - 1
    assert schedule(*shape, beside, resident=beside).end == -(-shape[0] * shape[1] // beside)


def test_helpers_end_on_any_number_of_sms():
    for resident in (1, 2, 7, 8, 9, 100):
        found = schedule(64, 16, SMS, item=ITEM, helpers=8, waves=4, resident=resident)
        assert sum(found.tiles) == 1024
        assert sum(found.items[: min(8, resident)]) == 64


def test_the_page_says_what_is_computed():
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    said = " ".join(page.partition("## When programs end, computed")[2].split())
    counted = {"item": 20_393 / 66_816, "helpers": 8, "waves": 2}
    late = [schedule(64, 16, SMS, **counted, **order).end for order in ({}, LOWEST_FIRST)]
    assert (
        "after {:.2f} rounds; if late tiles began with the helpers, after {:.2f}".format(*late)
        in said
    )
    few = [schedule(64, 4, SMS, item=ITEM, helpers=helpers).end for helpers in (32, 64)]
    read = forward_helpers(replace(CONFIG, helpers=64), SHRINK, 8192, 4096, 1024, 16, 2, False, SMS)
    assert "after {:.2f} rounds and 64 after {:.2f}, or {:.2f}".format(*few, read.rounds) in said
    shapes = [(64, 16), (64, 56), (64, 4)]
    beside = [
        [schedule(*shape, programs, resident=116).end for shape in shapes]
        for programs in (SMS, 116)
    ]
    assert f"take {beside[0][0]:.0f} rounds for 8" in said
    assert "{:.0f} for 28 at N = 14336 and {:.0f} for 2".format(*beside[0][1:]) in said
    assert "116 programs take {:.0f}, {:.0f} and {:.0f}".format(*beside[1]) in said
