"""What the kernels of skinny operations take of an SM beside memory, as tests/ptx counts it.

    clocks = elements / SMs · (once + by_rank · ⌈r / 16⌉) / 1000

of the unit that is busy the longest, be it the issue of instructions, shared memory or L2, while nothing
waits for anything: a bound from below.
"""

from dataclasses import dataclass

import torch

from lorafast.backends.cost import Device
from lorafast.core.problem import Problem

_CLOCK = 1.4e9
"""Of the slowest card that was counted for, A100. T4 has 1.59e9 at most, less when it is warm."""
_RANKS = 16


@dataclass(frozen=True)
class Counted:
    """Clocks for 1,000 elements of the large matrix: ``once``, and ``by_rank`` for each 16 ranks."""

    once: float
    by_rank: float


_BFLOAT16 = {
    ("shrink", False): Counted(40, 11),
    ("shrink", True): Counted(195, 8),
    ("shrink_backward", False): Counted(38, 19),
    ("shrink_backward", True): Counted(173, 12),
    ("expand_backward", False): Counted(50, 30),
    ("expand", False): Counted(67, 8),
    ("expand", True): Counted(200, 8),
}
"""By operation and whether there is a mask: of 8192 rows, near the largest of sm_80, sm_86 and sm_90."""
_WIDE, _WIDE_BY_RANK = 4.0, 12.0
"""Times as many in float32 and float16, whose products are several in TF32."""
_TF32 = 80
"""The architecture from which there is TF32."""
_WITHOUT_TF32 = {
    torch.float16: {
        ("shrink", False): Counted(71, 200),
        ("shrink", True): Counted(137, 200),
        ("shrink_backward", False): Counted(63, 169),
        ("shrink_backward", True): Counted(125, 169),
        ("expand_backward", False): Counted(25, 458),
        ("expand", False): Counted(0, 494),
        ("expand", True): Counted(0, 494),
    },
    torch.float32: {
        ("shrink", False): Counted(200, 280),
        ("shrink", True): Counted(290, 280),
        ("shrink_backward", False): Counted(200, 280),
        ("shrink_backward", True): Counted(290, 280),
        ("expand_backward", False): Counted(400, 560),
        ("expand", False): Counted(30, 250),
        ("expand", True): Counted(115, 250),
    },
}
"""The same of sm_75, without moves between registers, which ptxas leaves out. float16 is multiplied by
three parts of a float32 factor; float32, and all of ``expand``, without tensor cores."""


def seconds(p: Problem, device: Device) -> float:
    """Of a skinny operation or ``expand``."""
    return clocks(p, device) / _CLOCK


def clocks(p: Problem, device: Device) -> float:
    """Of an SM, the same."""
    masked = p.dropout and p.operation != "expand_backward"
    elements = p.M * (p.K or p.N)
    if device.capability < _TF32:
        counted = _WITHOUT_TF32[p.dtype][p.operation, masked]
        return elements / 1000 * (counted.once + counted.by_rank * -(-p.r // _RANKS)) / device.sms
    counted = _BFLOAT16[p.operation, masked]
    narrow = p.dtype is torch.bfloat16
    once = counted.once * (1.0 if narrow else _WIDE)
    by_rank = counted.by_rank * (1.0 if narrow else _WIDE_BY_RANK)
    return elements / 1000 * (once + by_rank * -(-p.r // _RANKS)) / device.sms
