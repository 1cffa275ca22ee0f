"""``Launch``: what a family of CUDA C++ kernels answers where it can serve a problem."""

from dataclasses import dataclass

from lorafast.backends.plan import Run

CALL_HOST = 10e-6
"""Host time of one of our operations: 7 µs for an op of the stable ABI through the dispatcher, measured
on a CPU, and an estimate of 3 for the driver's share of a launch, as Triton's model has it."""


@dataclass(frozen=True)
class Launch:
    """How an operation will be launched.

    - ``run``: does it, with the arguments of ``lorafast.backends.plan.Plan``;
    - ``line``: says it, for the readers of ``explain``: the kernel, its grid, its tile;
    - ``flops``, ``moved``: floating-point operations, and bytes to and from memory, scratch included;
    - ``launches``: how many kernels;
    - ``seconds``: of the device, by what is counted of the launch, None where ``flops`` and ``moved``
      say all that is known.
    """

    run: Run
    line: str
    flops: float
    moved: float
    launches: int = 1
    seconds: float | None = None
