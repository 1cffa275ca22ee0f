"""The geometry of a convolution: stride, padding, dilation and groups."""

from typing import NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """Where the windows of a convolution lie; a number for each spatial dimension, but ``groups``."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def of_A(self) -> "Geometry":
        """The convolution with A: of the same windows, over all channels."""
        return self._replace(groups=1)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``conv(x, W) + bias`` in one, two or three dimensions; ``x`` is a batch."""
    stride, padding, dilation, groups = geometry
    none = (0,) * len(stride)
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, none, groups)


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a position are neighbours in memory, and positions in order.

    An ``x`` of one channel, or of one position, may be contiguous too.
    """
    if x.dim() == 4:  # PyTorch's own answer takes no view
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()
