"""Host time of a call of csrc/cuda: microseconds from Python to the launch, on this CPU.

    PYTHONPATH=.:tests:tests/kernels:tests/cuda python -m host_time

The launchers run against the fake runtime, whose launch is a callback to Python that does nothing: its
time is in every line, that of a driver in none. What a call allocates before is not in it.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from launchers import FAKE_STREAM, launchers
from ptx import cuda_counts
from ptx.cuda_counts import Subject

SUBJECTS = (
    Subject("shrink", "skinny", (512, 1024, 0, 16)),
    Subject("expand_backward", "skinny", (512, 0, 1024, 16)),
    Subject("expand", "small", (512, 0, 1024, 16)),
    Subject("lora_linear", "small", (64, 256, 256, 16)),
    Subject("lora_linear", "decode", (1, 1024, 1024, 16)),
    Subject("linear_expand", "linear_expand", (512, 1024, 1024, 16), variant="forward"),
)


def microseconds(call: Callable[[], Any], seconds: float = 0.3) -> float:
    """The median of short series."""
    found, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        for _ in range(50):
            call()
        found.append((time.perf_counter() - begin) / 50)
    return 1e6 * statistics.median(found)


def main() -> None:
    """Prints a line for each operation."""
    torch.set_num_threads(1)
    of = launchers()
    for subject in SUBJECTS:
        whole = cuda_counts.whole_of(subject, 80)
        assert isinstance(whole, cuda_counts.Whole), whole
        given = whole.call({})
        of.device(80, 108, FAKE_STREAM)
        of.to(lambda launch: 0)
        call = microseconds(lambda func=whole.func, given=given: func(*given))
        of.reset()
        print(f"{subject.operation:<18}{subject.family:<16}{call:6.1f} µs")


if __name__ == "__main__":
    main()
