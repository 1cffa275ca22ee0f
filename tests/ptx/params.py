"""Parameters of a kernel, and the bytes that an argument becomes."""

from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from .syntax import PtxError


@dataclass(frozen=True)
class Param:
    name: str
    type: str
    offset: int
    size: int
    alignment: int
    array: bool  # a struct or a tensor map, given as bytes
    pointer: bool

    @property
    def kind(self):
        """For people: its type, or how large an array is."""
        return f"{self.size} bytes" if self.array else self.type

    @property
    def address(self):
        """Whether it can hold one."""
        return not self.array and self.type in ("u64", "s64", "b64")


def packed_argument(kernel, param, value):
    """The bytes of one argument; a parameter without a kind (.b32) takes an int or a float."""
    bits = 8 * param.size

    def refused(expected):
        return PtxError(f"{kernel}: argument {param.name} is {value!r:.60}, expected {expected}")

    if param.array:
        if not isinstance(value, bytes):
            raise refused(f"{param.size} bytes")
        if len(value) != param.size:
            raise PtxError(
                f"{kernel}: argument {param.name} has {len(value)} bytes, expected {param.size}"
            )
        return value
    untyped = param.type in ("b32", "b64")
    fraction = isinstance(value, Real) and not isinstance(value, Integral)
    if param.type in ("f32", "f64") or (untyped and fraction):
        if not isinstance(value, Real):
            raise refused("a number")
        with np.errstate(over="ignore"):
            return np.float64(value).astype(f"<f{param.size}").tobytes()
    if not isinstance(value, Integral) or not -(1 << bits - 1) <= value < 1 << bits:
        raise refused(f"an integer of {bits} bits" + " or a float" * untyped)
    return (int(value) % (1 << bits)).to_bytes(param.size, "little")
