"""Tensor descriptors, from which TMA's maps are made at a launch."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_ALIGNED = 16


def describer(block: list[int]) -> Callable[[Tensor], TensorDescriptor]:
    """What describes matrices that are read or written in tiles of ``block``.

    Triton looks a descriptor over when it is made, which takes as long as the launch that it is for. So
    the last matrix' shape and strides are kept, never its memory, and one like it isn't looked over.

    Raises (what is returned):
        ValueError: the matrix doesn't lie in memory as TMA needs it.
    """
    known: tuple[Any, Any, dict[str, Any]] | None = None

    def describe(matrix: Tensor) -> TensorDescriptor:
        nonlocal known
        shape, strides = matrix.shape, matrix.stride()
        last = known
        if matrix.data_ptr() % _ALIGNED:
            raise ValueError(f"{_described(matrix)} begins between 16 bytes, and its plan has TMA")
        if last is not None and last[0] == shape and last[1] == strides:
            made: TensorDescriptor = object.__new__(TensorDescriptor)
            made.__dict__.update(last[2])
            made.base = matrix
            return made
        row = strides[0] * matrix.element_size()
        if strides[1] != 1 or row % _ALIGNED or not row:
            raise ValueError(
                f"{_described(matrix)} has no rows that TMA can read, as its plan says"
            )
        made = TensorDescriptor(matrix, shape, strides, block)
        known = shape, strides, {k: v for k, v in vars(made).items() if k != "base"}
        return made

    return describe


def _described(matrix: Tensor) -> str:
    return f"a matrix of shape {list(matrix.shape)} and strides {list(matrix.stride())}"
