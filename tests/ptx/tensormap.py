"""Tensor maps: what a bulk tensor copy knows of a tensor.

`encode` stands in for the driver's `cuTensorMapEncodeTiled` and refuses what that refuses. NVIDIA's
content of the 128 bytes isn't public; this one is the machine's own (`machine/tensormap.h`). Everything
has the fastest dimension first, as CUDA has it.
"""

import struct
from dataclasses import dataclass
from typing import Any

ELEMENTS = {
    "uint8": 1, "uint16": 2, "uint32": 4, "int32": 4, "uint64": 8, "int64": 8,
    "float16": 2, "float32": 4, "float64": 8, "bfloat16": 2,
}  # fmt: skip
"""Bytes of the types of elements, in the order of `CUtensorMapDataType`."""
FLOATS = ("float16", "float32", "float64", "bfloat16")
SWIZZLES = (0, 32, 64, 128)
"""Bytes that a swizzle spans, in the order of `CUtensorMapSwizzle`."""
BYTES = 128
MOST_DIMS = 5
_MAGIC = b"PTX-tmap"
_LAYOUT = "<8s Q 5Q 4Q 5H 5B 5B 20x"


def encode(
    *,
    address: int,
    element_bytes: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int = 0,
    fill_nan: bool = False,
    dtype: str | None = None,
    element_strides: tuple[int, ...] | None = None,
    interleave: int = 0,
) -> bytes:
    """The 128 bytes of a tensor map.

    ``strides`` are in bytes, of all dimensions but the first; ``swizzle`` is in bytes. ``dtype`` matters
    to reductions and to ``fill_nan`` and is an unsigned integer unless given. Raises ``ValueError``.
    """
    rank = len(sizes)
    if dtype is None:
        dtype = f"uint{8 * element_bytes}"
    element_strides = element_strides or (1,) * rank
    why = _why_invalid(
        address,
        element_bytes,
        sizes,
        strides,
        box,
        swizzle,
        fill_nan,
        dtype,
        element_strides,
        interleave,
    )
    if why:
        raise ValueError(f"a tensor map's {why}")

    def padded(values: tuple[int, ...], count: int = MOST_DIMS) -> tuple[int, ...]:
        return tuple(values) + (0,) * (count - len(values))

    return struct.pack(
        _LAYOUT, _MAGIC, address, *padded(sizes), *padded(strides, MOST_DIMS - 1), *padded(box),
        *padded(element_strides), rank, list(ELEMENTS).index(dtype), element_bytes, swizzle, fill_nan,
    )  # fmt: skip


def _why_invalid(
    address: int,
    element_bytes: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
    fill_nan: bool,
    dtype: str,
    element_strides: tuple[int, ...],
    interleave: int,
) -> str | None:
    """By the requirements that `cuda.h` states above `cuTensorMapEncodeTiled`."""
    rank = len(sizes)
    if not 1 <= rank <= MOST_DIMS:
        return f"rank is {rank}, expected 1 to {MOST_DIMS}"
    for name, values, count in (
        ("strides", strides, rank - 1),
        ("box", box, rank),
        ("element_strides", element_strides, rank),
    ):
        if len(values) != count:
            return f"{name} has {len(values)} numbers, expected {count} for {rank} dimensions"
    if dtype not in ELEMENTS:
        return f"dtype is {dtype!r}, expected one of {', '.join(ELEMENTS)}"
    if ELEMENTS[dtype] != element_bytes:
        return f"dtype {dtype} has {ELEMENTS[dtype]} bytes an element, not {element_bytes}"
    if interleave != 0:
        return f"interleave is {interleave}, and the machine has no interleaved layouts"
    if swizzle not in SWIZZLES:
        return f"swizzle is {swizzle}, expected one of {', '.join(map(str, SWIZZLES))} bytes"
    if address % 16 or address == 0:
        return f"address is {address:#x}, expected a multiple of 16"
    for i, size in enumerate(sizes):
        if not 1 <= size <= 1 << 32:
            return f"size {i} is {size}, expected 1 to 2**32"
    for i, stride in enumerate(strides, 1):
        if stride % 16 or not 0 <= stride < 1 << 40:
            return f"stride {i} is {stride} bytes, expected a multiple of 16 below 2**40"
    for i, count in enumerate(box):
        if not 1 <= count <= 256:
            return f"box {i} is {count}, expected 1 to 256"
    inner = box[0] * element_bytes
    if inner % 16:
        return f"box has {inner} bytes a row, expected a multiple of 16"
    if swizzle and inner > swizzle:
        return f"box has {inner} bytes a row, more than the swizzle's {swizzle}"
    for i, stride in enumerate(element_strides):
        if not 1 <= stride <= 8:
            return f"element stride {i} is {stride}, expected 1 to 8"
    if fill_nan and dtype not in FLOATS:
        return f"dtype is {dtype}, and only a float can be filled with NaN"
    return None


@dataclass(frozen=True)
class TensorMap:
    """A tensor map as an argument of a launch: of a tensor, which is an ``In``, ``Out`` or ``InOut``.

    Dimensions are the tensor's, in reverse.
    """

    tensor: Any
    box: tuple[int, ...]
    swizzle: int = 0
    fill_nan: bool = False
    dtype: str | None = None
    element_strides: tuple[int, ...] | None = None

    def encoded(self, address: int) -> bytes:
        """Its bytes, of the tensor at an address."""
        from .launch import memory_of  # which imports this file

        at = memory_of(self.tensor.array)
        if at.strides and at.strides[-1] != 1:
            raise ValueError(
                f"a tensor map's fastest dimension has a stride of {at.strides[-1]}, expected 1"
            )
        return encode(
            address=address,
            element_bytes=at.item,
            sizes=at.shape[::-1],
            strides=tuple(s * at.item for s in at.strides[-2::-1]),
            box=self.box,
            swizzle=self.swizzle,
            fill_nan=self.fill_nan,
            dtype=self.dtype,
            element_strides=self.element_strides,
        )
