"""Bookkeeping of the clocks; nothing is timed here."""

from contextlib import contextmanager

import pytest
from lorafast.bench.common import clock
from lorafast.bench.common.clock import HostClock, Summary, interleave


class FakeClock:
    """Contender ``a`` takes 2 seconds, ``b`` 3, in rounds in which the machine slows down."""

    def __init__(self):
        self.seen = []

    def round(self, turns, first):
        slow = 1 + len(self.seen)
        self.seen.append([(name, first + i) for i, (name, _) in enumerate(turns)])
        return {name: slow * {"a": 2.0, "b": 3.0}[name] for name, _ in turns}


def turns():
    return {"a": lambda index: None, "b": lambda index: None}


def test_warm_up_rounds_are_not_kept():
    fake = FakeClock()
    samples = interleave(fake, turns(), seconds=0.0, least=5, most=100, warm_up=3)
    assert len(fake.seen) == 8
    assert samples["a"] == [2.0 * slow for slow in range(4, 9)]


def test_every_round_has_every_contender_once_and_orders_differ():
    fake = FakeClock()
    interleave(fake, turns(), seconds=1e9, least=5, most=30, warm_up=2)
    orders = {tuple(name for name, _ in seen) for seen in fake.seen}
    assert orders == {("a", "b"), ("b", "a")}


def test_no_two_calls_in_a_row_get_the_same_input_set():
    fake = FakeClock()
    interleave(fake, turns(), seconds=0.0, least=4, most=4)
    assert [index for seen in fake.seen for _, index in seen] == list(range(12))


def test_a_ratio_is_taken_within_a_round():
    samples = interleave(FakeClock(), turns(), seconds=0.0, least=9)
    assert Summary.of_ratio(samples["b"], samples["a"]) == Summary(1.5, 1.5, 1.5)
    assert Summary.of_ratio(samples["a"], samples["a"]) == Summary(1.0, 1.0, 1.0)


def test_summary_is_median_and_middle_half():
    assert Summary.of([1, 2, 3, 4, 100]) == Summary(3, 2, 4)
    assert Summary.of([7]) == Summary(7, 7, 7)


def test_only_the_call_is_timed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    @contextmanager
    def turn(index):
        now[0] += 100  # preparation
        yield lambda: now.__setitem__(0, now[0] + index)
        now[0] += 1000  # and what follows

    assert HostClock().round([("a", turn), ("b", turn)], 5) == pytest.approx({"a": 5, "b": 6})
