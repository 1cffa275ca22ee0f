"""The numbers that codes of few bits stand for: NF4, FP4, E2M1, and the 8-bit dynamic type.

A code is the index of its number. All numbers are float32's nearest to what the format says.
"""

from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from lorafast.core.context import transforms_active
from lorafast.core.device_memory import lasting

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""4-bit NormalFloat (QLoRA, arXiv 2305.14314, appendix E): quantiles of a normal distribution."""

_HALF_FP4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
FP4 = (*_HALF_FP4, *(-value for value in _HALF_FP4))
"""bitsandbytes' 4-bit floats, over their greatest: sign, two bits of exponent, one of mantissa."""

_HALF_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_HALF_E2M1, *(-value for value in _HALF_E2M1))
"""The elements of MXFP4 (OCP Microscaling Formats 1.0)."""


_on_device: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}


def codebook(values: tuple[float, ...], codes: Tensor) -> Tensor:
    """The numbers as a float32 tensor where ``codes`` are; each call may give the same one."""
    if torch.compiler.is_compiling() or transforms_active() or is_fake(codes):  # none to be kept
        return torch.tensor(values, dtype=torch.float32, device=codes.device)
    key = values, codes.device
    found = _on_device.get(key)
    if found is None:
        found = _on_device[key] = lasting(
            lambda: torch.tensor(values, dtype=torch.float32, device=codes.device), codes.device
        )
    return found


@cache
def dynamic() -> tuple[float, ...]:
    """The signed 8-bit dynamic type (8-bit Approximations for Parallelism, arXiv 1511.04561), ascending.

    Its 256 numbers are 0, 1 and, for i from 0 to 6, the middles of 2^i equal parts of [0.1, 1] times
    10^(i - 6), with both signs. bitsandbytes has nested scales in it.
    """
    found = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        middles = (10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        found += middles + [-middle for middle in middles]
    return tuple(sorted(found))
