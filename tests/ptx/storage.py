"""Memory of a module's `.global` and `.const` variables, with what their initialisers say."""

import math
from dataclasses import dataclass

import numpy as np

from .syntax import Float, Integer, Link, PtxError


@dataclass(frozen=True)
class Buffer:
    """Bytes of a variable. The module owns them: what one of its kernels stores, the next one loads."""

    name: str
    constant: bool
    data: np.ndarray  # uint8

    @property
    def address(self):
        return self.data.ctypes.data


def allocate(module):
    """Fills `module.memory`, once: zeros, then initialisers."""
    if module.memory:
        return
    for variable in module.statics:
        size, alignment = variable.size, max(variable.align, 16)
        if None in variable.shape:
            raise PtxError(f"line {variable.line}: {variable.name} has no size")
        room = np.zeros(size + alignment, np.uint8)
        start = -room.ctypes.data % alignment
        module.memory[variable] = Buffer(
            variable.name, variable.space == "const", room[start : start + size]
        )
    for variable in module.statics:
        if variable.initial is not None:
            data = b"".join(_scalar(module, variable, value) for value in _scalars(variable))
            module.memory[variable].data[:] = np.frombuffer(data, np.uint8)


def _scalars(variable):
    """The initialiser's values in the order of memory; what a row leaves out is zero."""

    def flat(value, shape):
        if isinstance(value, tuple) != bool(shape):
            raise PtxError(
                f"line {variable.line}: the initialiser of {variable.name} is not of its shape"
            )
        if not shape:
            return [value]
        if len(value) > shape[0]:
            found = f"{len(value)} values in a row of {shape[0]}"
            raise PtxError(f"line {variable.line}: the initialiser of {variable.name} has {found}")
        rows = [scalar for row in value for scalar in flat(row, shape[1:])]
        return rows + [Integer(0)] * (math.prod(shape) - len(rows))

    return flat(
        variable.initial, (*variable.shape, *([variable.vector] if variable.vector > 1 else []))
    )


def _scalar(module, variable, value):
    size, where = variable.element, f"line {variable.line}: {variable.name}"
    if isinstance(value, Link):
        value = Integer(_address(module, value, where))
    if isinstance(value, Float):
        if size not in (4, 8) or variable.type[0] in "us":
            raise PtxError(f"{where} is of .{variable.type} and holds {value}")
        return pattern(value, 8 * size).to_bytes(size, "little")
    if variable.type[0] == "f" and value.value:
        raise PtxError(f"{where} is of .{variable.type} and holds the integer {value}")
    return (value.value % (1 << 8 * size)).to_bytes(size, "little")


def _address(module, link, where):
    linked = module.memory.get(module.variables.get(link.name))
    if linked is None:
        raise PtxError(f"{where} holds the address of {link.name}, which has none in global memory")
    address = linked.address + link.offset
    if link.mask is None:
        return address
    return (address & link.mask) >> (link.mask & -link.mask).bit_length() - 1


def pattern(number, bits):
    """A literal's bits in a type of 32 or 64 bits: 0f… as it is written, a double rounded."""
    if number.width == 32 or bits == 64:
        return number.bits
    double = np.uint64(number.bits).view(np.float64)
    with np.errstate(over="ignore"):
        return int(double.astype(np.float32).view(np.uint32))
