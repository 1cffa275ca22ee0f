"""Launching a kernel again, past what Triton finds out about its arguments every time.

Triton looks at each argument of a launch: its type, whether a pointer is a multiple of 16, what an
integer is divided by. That takes as long as all the rest. A launcher knows what may differ between two
calls of one launch, which is little: it says so in a key, and a compiled kernel is kept for it.
"""

from collections.abc import Hashable
from typing import Any

from torch import Tensor
from triton import knobs

_MOST = 64
"""Compiled kernels that are kept of one launch; more strides than these begin anew."""
_ALIGNED = 16
_FIRST_DEVICE = 0
"""The least index of a device on which kernels are kept: that of the CPU, which interprets, is -1."""


class Start:
    """Starts ``kernel`` on ``grid``, with the compiler's ``options``.

    Calls of one key have the same types, the same integers, None in the same places, and no pointer but
    to multiples of 16 bytes; a key of None says nothing, and Triton looks for itself.

    It also does where launches are watched: with hooks before a run, in debug mode, and while Proton
    instruments kernels. Its other knobs are read at the first launch of a key; hooks at a launch's begin
    and end are called at every one.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], options: dict[str, object]) -> None:
        self._kernel = kernel
        self._grid = grid
        self._options = options
        self._known: dict[Hashable, Any] = {}

    def __call__(self, key: Hashable, *arguments: Any) -> None:
        """Starts it with all of its arguments, by position."""
        known = self._known.get(key)
        if known is not None and not self._watched():
            known(*arguments)
            return
        compiled = self._kernel[self._grid](*arguments, **self._options)
        # None where it was interpreted, without a grid where it is still being compiled elsewhere.
        if key is None or not hasattr(type(compiled), "__getitem__") or self._watched():
            return
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[key] = compiled[(*self._grid, 1, 1)[:3]]

    def _watched(self) -> bool:
        return bool(
            self._kernel.pre_run_hooks
            or knobs.runtime.debug
            or knobs.compilation.instrumentation_mode
        )


def key_of(*parts: Hashable, tensors: tuple[Tensor | None, ...]) -> Hashable:
    """The key of a call whose ``parts`` may differ from another's, on these ``tensors`` of others, whose
    types it has.

    What a launcher has allocated itself is aligned, and of a type that follows from theirs.
    """
    first = tensors[0]
    assert first is not None
    index = first.get_device()
    if index < _FIRST_DEVICE:
        return None
    address = 0
    types: list[Hashable] = []
    for tensor in tensors:
        if tensor is None:
            types.append(None)
        else:
            address |= tensor.data_ptr()
            types.append(tensor.dtype)
    return None if address % _ALIGNED else (index, *parts, *types)
