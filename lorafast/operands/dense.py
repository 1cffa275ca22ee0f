"""The format ``dense``: W ``[N, K]`` is a tensor, in the dtype of x, with any strides."""

import torch.nn.functional as F
from torch import Tensor

from lorafast.operands import packed


def kept_transposed(weight: Tensor) -> Tensor:
    """W of a layer that keeps it as ``[K, N]``: a view."""
    return weight.t()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x·Wᵀ + bias``, by the packed copy of W where there is one."""
    return packed.linear(x, weight, bias)


def linear_transposed(dy: Tensor, weight: Tensor) -> Tensor:
    """``dy·W``."""
    return F.linear(dy, weight.t())


def add_linear_(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``y += x·Wᵀ``."""
    return y.addmm_(x, weight.t())


def add_linear_transposed_(dx: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """``dx += dy·W``."""
    return dx.addmm_(dy, weight)
