"""The formats ``nf4`` and ``fp4``: codes of 4 bits with a scale a block, as bitsandbytes stores them.

QLoRA (arXiv 2305.14314). Elements of W ``[N, K]`` are counted row by row, and so are blocks: one may
straddle rows, and the last may be short. Element i is ``numbers[code i] · scale[i // block]`` in
float32, rounded to the dtype of W. Two codes share a byte, the first of them its upper half. Scales are
float32, or nested: ``scale[b] = nested_quant_map[absmax[b]] · nested_absmax[b // nested_block] +
nested_offset``.
"""

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lorafast.core import codebooks
from lorafast.core.codebooks import codebook
from lorafast.core.dtypes import FLOATS
from lorafast.operands.operand import Operand, Split, check_quantizable, check_tensors

NESTED = ("nested_absmax", "nested_quant_map", "nested_offset")
_NUMBERS = 256
"""Of the nested type."""
MOST = 2**31 - 1
"""Elements of a block."""


def check_block(name: str, size: object) -> None:
    """Whether a block may have so many elements.

    Raises:
        ValueError: it is no int, nor is it a bool or a float that equals one, or it is out of range.
    """
    if type(size) is not int:
        raise ValueError(f"{name} is {size!r}, expected an int from 1 to {MOST}")
    if not 1 <= size <= MOST:
        raise ValueError(f"{name} is {shortened(size)}, expected 1 to {MOST}")


def shortened(number: int) -> str:
    """An integer as text, without the digits of one that has hundreds."""
    return str(number) if number.bit_length() <= 128 else f"of {number.bit_length()} bits"


class FourBit(Operand):
    """W ``[N, K]`` of 4-bit codes. What ``tensors`` has:

    - ``weight``: the codes, ``⌈N·K / 2⌉`` bytes of any shape, of any dtype;
    - ``absmax``: a scale each block, float32; or, nested, its code, uint8;
    - nested alone: ``nested_absmax``, float32, a scale each ``nested_block`` scales;
      ``nested_quant_map``, the 256 float32 numbers of the codes; ``nested_offset``, one float32.

    Raises:
        ValueError: the tensors don't fit; the message names the one, what it is, what was expected.
    """

    numbers: ClassVar[tuple[float, ...]]
    keeps_dtypes = True
    stored_dtype: torch.dtype
    """What W is rounded to, whatever ``to`` has made ``dtype``."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        shape: tuple[int, int],
        dtype: torch.dtype,
        block: int,
        nested_block: int | None = None,
    ) -> None:
        if dtype not in FLOATS:
            raise ValueError(f"weight is of {dtype}, expected a float dtype")
        sizes = isinstance(shape, list | tuple) and len(shape) == 2
        if not sizes or not all(isinstance(size, int | torch.SymInt) for size in shape):
            raise ValueError(f"weight is said to have shape {shape!r}, expected two sizes (N, K)")
        names = ("weight", "absmax", *(NESTED if nested_block is not None else ()))
        check_tensors(tensors, names)
        self._tensors = {name: tensors[name] for name in names}
        self.shape = torch.Size(shape)
        self.dtype = self.stored_dtype = dtype
        self.block, self.nested_block = block, nested_block
        self._check()
        self.parameters = _parameters(shape, dtype, block, nested_block)

    def _check(self) -> None:
        check_block("block", self.block)
        if self.nested_block is not None:
            check_block("nested_block", self.nested_block)
        # numel() of a shape may overflow.
        n, codes = self.shape[0] * self.shape[1], self._tensors["weight"]
        found = codes.numel() * codes.element_size()  # nbytes may not be symbolic
        if min(self.shape) < 0 or found != (n + 1) // 2:
            raise ValueError(
                f"weight has {found} bytes of codes, expected {(n + 1) // 2} for "
                f"{self.shape[0]} x {self.shape[1]}"
            )
        for name, tensor in self._tensors.items():
            if not tensor.is_contiguous():
                raise ValueError(f"{name} has strides {tensor.stride()}, expected contiguous")
        blocks = -(-n // self.block)
        nested = self.nested_block is not None
        self._expect("absmax", torch.uint8 if nested else torch.float32, blocks)
        if self.nested_block is not None:
            self._expect("nested_absmax", torch.float32, -(-blocks // self.nested_block))
            self._expect("nested_quant_map", torch.float32, _NUMBERS)
            self._expect("nested_offset", torch.float32, 1)

    def _expect(self, name: str, dtype: torch.dtype, count: int) -> None:
        tensor = self._tensors[name]
        if tensor.dtype is not dtype or tensor.numel() != count:
            raise ValueError(
                f"{name} is {tensor.dtype} of {tensor.numel()} elements, expected {dtype} of {count}: "
                f"the weight is {self.shape[0]} x {self.shape[1]} in blocks of {self.block}"
            )

    @classmethod
    def of(
        cls, weight: Tensor, block: int = 64, *, nested: bool = True, nested_block: int = 256
    ) -> "FourBit":
        """The nearest to a weight ``[N, K]``.

        A block is divided by its greatest magnitude. ``nested``: their mean is taken off these, and they
        are 8-bit codes in turn, by blocks of ``nested_block``. Memory beyond what is returned, twice, is
        that of a chunk of a million elements, and a copy of a ``weight`` that is not contiguous.

        Raises:
            ValueError: ``weight`` is no float matrix, or an option is not what it must be.
        """
        check_quantizable(weight)
        check_block("block", block)
        check_block("nested_block", nested_block)
        if type(nested) is not bool:
            raise ValueError(f"nested is {nested!r}, expected True or False")
        flat = weight.detach().reshape(-1)
        N, K = weight.shape
        numbers = codebook(cls.numbers, flat)
        order = numbers.argsort()
        ascending, codes_of = numbers[order], order.to(torch.uint8)
        # Nothing is written in place: a mode or a transform may have kept it.
        every_code, every_scale = [codes_of[:0]], [numbers[:0]]
        for found, scales in _nearest(flat, ascending, block):
            codes = codes_of[found]
            if codes.numel() % 2:  # the last one: what is left over stands for 0
                codes = torch.cat((codes, codes_of[torch.searchsorted(ascending, 0.0)][None]))
            every_code.append(codes[::2] << 4 | codes[1::2])
            every_scale.append(scales)
        packed, absmax = torch.cat(every_code), torch.cat(every_scale)
        made = {"weight": packed.view(N, K // 2) if K % 2 == 0 else packed, "absmax": absmax}
        if nested:
            offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
            map_ = codebook(codebooks.dynamic(), flat)
            left = absmax - offset
            every_code, every_scale = [codes_of[:0]], [numbers[:0]]
            for found, scales in _nearest(left, map_, nested_block):
                every_code.append(found.to(torch.uint8))
                every_scale.append(scales)
            made |= {
                "absmax": torch.cat(every_code), "nested_absmax": torch.cat(every_scale),
                "nested_quant_map": map_.clone(), "nested_offset": offset,
            }  # fmt: skip
        return cls(made, (N, K), weight.dtype, block, nested_block if nested else None)

    def like(self, weight: Tensor) -> "FourBit":
        """``weight`` in blocks of this one's size, nested if this is."""
        nested = self.nested_block is not None
        made = self.of(weight, self.block, nested=nested, nested_block=self.nested_block or 256)
        N, K = made.shape
        found = type(self)(made.tensors(), (N, K), self.stored_dtype, self.block, self.nested_block)
        return found.to(self.dtype)  # type: ignore[return-value]

    def split(self, dim: int, parts: int) -> Split:
        """A part has whole blocks. Where it has no whole blocks of nested scales, and along columns, all
        of W's scales are float32: the same numbers."""
        (N, K), block = self.shape, self.block
        size = self._check_split(dim, parts)
        count = size * K if dim == 0 else size
        if count % block or count % 2:
            self._check_split(dim, parts, block // math.gcd(block, K) if dim == 0 else block)
            raise ValueError(f"is stored as {self.format}, of which a part would have half a byte")
        codes = _plain(self._tensors["weight"]).view(torch.uint8).reshape(-1)
        codes = codes.view(N, K // 2) if K % 2 == 0 else codes
        nested_block = self.nested_block
        dims: dict[str, int | None] = {"weight": dim, "absmax": dim}
        if nested_block is not None and dim == 0 and count // block % nested_block == 0:
            tensors = {name: _plain(tensor) for name, tensor in self._tensors.items()}
            tensors |= {name: tensors[name].reshape(-1) for name in ("absmax", NESTED[0])}
            dims |= {NESTED[0]: 0, NESTED[1]: None, NESTED[2]: None}
        else:
            scales = _plain(self._scales(0, -(-N * K // block)))
            tensors = {"absmax": scales if dim == 0 else scales.view(N, K // block)}
            nested_block = None
        tensors["weight"] = codes
        tensors = {name: tensors[name] for name in dims}
        sizes = (size, K) if dim == 0 else (N, size)
        whole, part = (
            _parameters(shape, self.stored_dtype, block, nested_block) for shape in ((N, K), sizes)
        )
        return Split(tensors, dims, whole, part)

    def tensors(self) -> Mapping[str, Tensor]:
        """``weight``, ``absmax`` and, if they are nested, what these are made of."""
        return self._tensors

    @classmethod
    def build(cls, tensors: Mapping[str, Tensor], parameters: str) -> "FourBit":
        """From ``tensors()`` and ``parameters``, which is "NxK,dtype,block" and the nested block."""
        try:
            sizes, name, *blocks = parameters.split(",")
            N, K = map(int, sizes.split("x"))
            block, *nested = map(int, blocks)
            dtype = getattr(torch, name)
            if len(nested) > 1:
                raise ValueError
        except (ValueError, AttributeError):
            raise ValueError(
                f"weight is said to be {parameters!r}, expected sizes, dtype and block, as "
                "'4096x4096,bfloat16,64'"
            ) from None
        return cls(tensors, (N, K), dtype, block, nested[0] if nested else None)

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows of W, dense."""
        K = self.shape[1]
        first, last = begin * K, end * K
        codes = self._tensors["weight"].view(torch.uint8).reshape(-1)
        codes = codes[first // 2 : (last + 1) // 2]
        both = torch.stack((codes >> 4, codes & 15), dim=1).reshape(-1)
        numbers = codebook(self.numbers, codes)[both[first % 2 :][: last - first].int()]
        before = first % self.block
        scales = self._scales(first // self.block, -(-last // self.block))
        if before == 0 and (last - first) % self.block == 0:
            numbers = (numbers.view(-1, self.block) * scales[:, None]).view(-1)
        else:
            which = torch.arange(before, before + last - first, device=codes.device) // self.block
            numbers = numbers * scales[which]
        return numbers.to(self.stored_dtype).to(self.dtype).view(end - begin, K)

    def _scales(self, begin: int, end: int) -> Tensor:
        """Those of blocks ``begin`` to ``end``, float32."""
        absmax = self._tensors["absmax"].reshape(-1)[begin:end]
        if self.nested_block is None:
            return absmax
        of_blocks, numbers, offset = (self._tensors[name].reshape(-1) for name in NESTED)
        which = torch.arange(begin, end, device=absmax.device) // self.nested_block
        return numbers[absmax.int()] * of_blocks[which] + offset


def _parameters(
    shape: tuple[int, int], dtype: torch.dtype, block: int, nested_block: int | None
) -> str:
    ending = "" if nested_block is None else f",{nested_block}"
    name = str(dtype).removeprefix("torch.")
    return f"{shape[0]}x{shape[1]},{name},{block}{ending}"


def _plain(tensor: Tensor) -> Tensor:
    """Its values, of no class of a library's."""
    return tensor.detach().as_subclass(Tensor)


_LEAST = 1e-38
"""What a block of zeros is divided by."""


_CHUNK = 1 << 20
"""Elements that are quantized at once, or two blocks, where these have more."""


def _nearest(flat: Tensor, numbers: Tensor, block: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The index, of ascending numbers, of the one that each value of a block is nearest to when that is
    divided by its greatest magnitude, int32; and that magnitude of each, float32.

    By chunks of an even number of whole blocks; the last may be short.
    """
    middles = (numbers[:-1] + numbers[1:]) / 2
    step = max(_CHUNK // (2 * block), 1) * 2 * block
    for begin in range(0, flat.numel(), step):
        values = flat[begin : begin + step].float()
        whole = values.numel() // block * block
        blocks = values[:whole].view(-1, block)
        absmax = blocks.abs().amax(1) if whole else values.new_empty(0)
        divided = (blocks * (1.0 / absmax.clamp(min=_LEAST))[:, None]).clamp(-1, 1).view(-1)
        rest = values[whole:]
        if rest.numel():  # a short block is divided, the others are multiplied
            greatest = rest.abs().amax().clamp(min=_LEAST)
            absmax = torch.cat((absmax, greatest[None]))
            divided = torch.cat((divided, (rest / greatest).clamp(-1, 1)))
        yield torch.bucketize(divided, middles, out_int32=True), absmax


class NF4(FourBit):
    """4-bit NormalFloat."""

    format = "nf4"
    numbers = codebooks.NF4


class FP4(FourBit):
    """4-bit floats, as bitsandbytes has them."""

    format = "fp4"
    numbers = codebooks.FP4
