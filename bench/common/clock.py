"""Time: every contender once a round, in turn, in one process.

Machines change their speed by the second; within a round all contenders see the same one. So a ratio
is the median of the ratios of single rounds, and its spread their middle half.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

Call = Callable[[], object]
Turn = Callable[[int], AbstractContextManager[Call]]
"""``with turn(i) as call`` does what isn't timed around the call that is, on input set i."""


class HostClock:
    """Wall time on the host, for devices that run a call before it returns."""

    def round(self, turns: Sequence[tuple[str, Turn]], first: int) -> dict[str, float]:
        """Seconds of each call, the first one on input set ``first``."""
        seconds = {}
        for index, (name, turn) in enumerate(turns, first):
            with turn(index) as call:
                start = time.perf_counter()
                call()
                seconds[name] = time.perf_counter() - start
        return seconds


class CudaClock:
    """GPU time between two events, the L2 cache flushed before each call, the host's time hidden.

    Before each call the device sleeps for longer than the host needed to queue that call so far: all
    of it is queued when the device gets there, and no contender inherits a queue from the one before.
    What a call costs the host is measured by ``call_overhead``.
    """

    _CYCLES = 2e9  # a second of sleep, about: clocks of data-centre GPUs
    _FIRST = 0.005

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(4 * cache, 1 << 28), dtype=torch.int8, device=device)
        self._queueing: dict[str, float] = {}

    def round(self, turns: Sequence[tuple[str, Turn]], first: int) -> dict[str, float]:
        """Seconds of each call, the first one on input set ``first``."""
        seconds = {}
        for index, (name, turn) in enumerate(turns, first):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with turn(index) as call:
                torch.cuda.synchronize()
                torch.cuda._sleep(int(2 * self._CYCLES * self._queueing.get(name, self._FIRST)))
                self._flush.zero_()
                begin.record()
                start = time.perf_counter()
                call()
                queued = time.perf_counter() - start
                end.record()
                end.synchronize()
            # A compilation in the first round must not make every later one wait.
            self._queueing[name] = min(queued, self._FIRST)
            seconds[name] = begin.elapsed_time(end) / 1e3
        return seconds


Clock = HostClock | CudaClock


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


def interleave(
    clock: Clock,
    turns: dict[str, Turn],
    *,
    seconds: float,
    least: int = 7,
    most: int = 200,
    warm_up: int = 2,
) -> dict[str, list[float]]:
    """Samples in seconds of every call, one a round, for about ``seconds`` in all.

    Each round has another order, so that none always finds the caches as the same one left them, and
    each call another input set.
    """
    order = list(turns.items())
    shuffle = random.Random(0).shuffle
    samples: dict[str, list[float]] = {name: [] for name in turns}
    for index in _rounds(seconds, least, most, warm_up):
        shuffle(order)
        times = clock.round(order, index * len(order))
        if index >= warm_up:
            for name, value in times.items():
                samples[name].append(value)
    return samples


def _rounds(seconds: float, least: int, most: int, warm_up: int) -> Iterator[int]:
    """Warm-up rounds, then as many as fit into ``seconds``."""
    yield from range(warm_up)
    start = time.perf_counter()
    for index in range(most):
        if index >= least and time.perf_counter() - start > seconds:
            return
        yield warm_up + index


@dataclass(frozen=True)
class Summary:
    """Median and middle half of samples."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Summary":
        """The summary of at least one sample."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)

    @classmethod
    def of_ratio(cls, samples: Sequence[float], to: Sequence[float]) -> "Summary":
        """The summary of the ratios of single rounds."""
        return cls.of([a / b for a, b in zip(samples, to, strict=True)])


class Timed:
    """What rows with ``samples`` and ``frozen_samples`` (seconds, round by round) say."""

    samples: list[float]
    frozen_samples: list[float]

    @property
    def time(self) -> Summary | None:
        """Seconds of a call."""
        return Summary.of(self.samples) if self.samples else None

    @property
    def overhead(self) -> Summary | None:
        """The ratio to the frozen contender, round by round."""
        return Summary.of_ratio(self.samples, self.frozen_samples) if self.samples else None
