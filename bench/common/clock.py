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
    """Time between two events on the current stream, the L2 cache flushed before each call.

    The flush also gives the host time to queue the call. The device is synchronised once a round.
    """

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(4 * cache, 1 << 28), dtype=torch.int8, device=device)

    def round(self, turns: Sequence[tuple[str, Turn]], first: int) -> dict[str, float]:
        """Seconds of each call, the first one on input set ``first``."""
        events = {}
        for index, (name, turn) in enumerate(turns, first):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with turn(index) as call:
                self._flush.zero_()
                begin.record()
                call()
                end.record()
            events[name] = (begin, end)
        torch.cuda.synchronize()
        return {name: begin.elapsed_time(end) / 1e3 for name, (begin, end) in events.items()}


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
    start = time.perf_counter()
    for index in range(warm_up + most):
        if index >= warm_up + least and time.perf_counter() - start > seconds:
            return
        yield index


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
