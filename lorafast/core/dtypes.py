"""The dtypes that layers may have, and the one in which their low-rank term lives."""

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLOAT_NAMES = "float16, bfloat16, float32 or float64"
LEAST_NORM = 2.0**-63
"""What DoRA divides a row of zeros by, whose norm is 0, so that it stays one: 0 / 0 would be NaN. It is
the least number whose square is a normal float32."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of ``s`` and ``ds`` for ``x`` of ``dtype``: float32 for float16, else ``dtype`` itself.

    float16 ends at 65,504 and keeps nothing below 6e-8: a float32 adapter makes an ``s`` beyond the
    one, and a young one a ``ds`` below the other.
    """
    return torch.float32 if dtype is torch.float16 else dtype
