"""``Launch``: what a family of CUDA C++ kernels answers where it can serve a problem."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lorafast.backends.plan import Run
from lorafast.reference.dropout import survivor_scale, threshold

CALL_HOST = 10e-6
"""Host time of one of our operations: 3 to 4 µs through the dispatcher, its checks and the launcher,
measured on a CPU (tests/cuda/host_time.py), as much for what is allocated before, and an estimate of 3
for the driver's share of a launch, as Triton's model has it."""

Choices = Mapping[str, int]
NONE: Choices = {}


@dataclass(frozen=True)
class Launch:
    """How an operation will be launched.

    - ``run``: does it, with the arguments of ``lorafast.backends.plan.Plan``;
    - ``line``: says it, for the readers of ``explain``: the kernel, its grid, its tile;
    - ``flops``, ``moved``: floating-point operations, and bytes to and from memory, scratch included;
    - ``launches``: how many kernels;
    - ``choices``: the sizes that were chosen for it and could be others, by name. A family that is given
      some of them takes those, where they can be;
    - ``seconds``: of the device, by what is counted of the launch, None where ``flops`` and ``moved``
      say all that is known.
    """

    run: Run
    line: str
    flops: float
    moved: float
    launches: int = 1
    choices: Choices = field(default_factory=dict)
    seconds: float | None = None


def neighbours(choices: Choices) -> Iterator[Choices]:
    """One of them half, twice, one less or one more, as whole numbers from 0."""
    for name, value in choices.items():
        for other in sorted({value // 2, value - 1, value + 1, 2 * value} - {value, -1}):
            yield {**choices, name: other}


Mask = tuple[Tensor | None, int, float]
"""As operations take it: seed, threshold, and the factor of what is kept."""
NO_MASK: Mask = None, 0, 1.0


def mask_of(masked: bool, dropout_p: float, seed: Tensor | None) -> Mask:
    """That of a call whose problem says whether it has one."""
    return (seed, *_numbers(dropout_p)) if masked else NO_MASK


@functools.lru_cache(maxsize=256)
def _numbers(dropout_p: float) -> tuple[int, float]:
    return threshold(dropout_p), survivor_scale(dropout_p)
