"""Arguments that belong together, as one argument of a device function.

A kernel's own parameters are plain; it makes bundles of them where it begins. That costs nothing: calls
are inlined, and what is compiled has the registers and the shared memory that it had without bundles.

As parameters of a kernel they compile too, with Triton 3.6 and 3.9 and in the interpreter. But each
costs half a microsecond of host time a launch, and no field of one can be kept from being specialised:
a dropout's threshold would be compiled anew where it is 1 or a multiple of 16. No field may be None:
Triton 3.6 doesn't pass such a bundle on.
"""

from typing import Any, NamedTuple


class Matrix(NamedTuple):
    """Element (i, j) is at ``ptr + i·stride_row + j·stride_col``."""

    ptr: Any
    stride_row: Any
    stride_col: Any


class Vector(NamedTuple):
    """Element i is at ``ptr + i·stride``."""

    ptr: Any
    stride: Any


class Mask(NamedTuple):
    """A dropout: an element whose 16 bits reach ``threshold`` stays, and is multiplied by ``scale``."""

    seed_ptr: Any
    threshold: Any
    scale: Any
