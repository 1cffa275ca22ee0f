"""The formats ``int8`` and ``fp8``: a code of 8 bits each element, with scales.

``W[n, k] = code[n, k] · scale``, in float32, rounded to the dtype of W. Scales are one for W, one each
row, or one each block of rows and columns.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lorafast.core.dtypes import FLOATS
from lorafast.operands.four_bit import MOST
from lorafast.operands.operand import Operand, Split, check_quantizable, check_tensors


class EightBit(Operand):
    """W ``[N, K]`` of 8-bit codes. What ``tensors`` has:

    - ``weight``: the codes ``[N, K]``, of ``code_dtype`` or as uint8;
    - ``scale``: float32, ``[]`` or ``[1]`` of all of W, ``[N]`` or ``[N, 1]`` of rows, or
      ``[⌈N / rows⌉, ⌈K / columns⌉]`` of blocks, which ``block`` says. A subclass may have other names
      for it (``names``), as the libraries have that write it.

    Raises:
        ValueError: the tensors don't fit; the message names the one, what it is, what was expected.
    """

    code_dtype: ClassVar[torch.dtype]
    names: ClassVar[Mapping[str, float]] = {"scale": 1.0}
    """What the scales may be called, and what they are then multiplied by."""
    keeps_dtypes = True
    stored_dtype: torch.dtype
    """What W is rounded to, whatever ``to`` has made ``dtype``."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        block: tuple[int, int] | None = None,
    ) -> None:
        self._name = next((name for name in self.names if name in tensors), "scale")
        check_tensors(tensors, ("weight", self._name))
        codes, scale = tensors["weight"], tensors[self._name]
        self._tensors = {"weight": codes, self._name: scale}
        if dtype not in FLOATS:
            raise ValueError(f"weight is of {dtype}, expected a float dtype")
        if codes.dtype not in (self.code_dtype, torch.uint8) or codes.dim() != 2:
            raise ValueError(
                f"weight is {codes.dtype} {list(codes.shape)}, expected {self.code_dtype} [N, K]"
                f"{WHO_CASTS if codes.dtype in FLOATS else ''}"
            )
        if block is not None and not _are_two_sizes(block):
            raise ValueError(f"block is {block!r}, expected two ints, of rows and of columns")
        self.shape, self.block = codes.shape, block
        self.dtype = self.stored_dtype = dtype
        self._check(scale)
        name = str(dtype).removeprefix("torch.")
        self.parameters = name if block is None else f"{name},{block[0]}x{block[1]}"

    def _check(self, scale: Tensor) -> None:
        (N, K), block = self.shape, self.block
        for name, tensor in self._tensors.items():
            if not tensor.is_contiguous():
                raise ValueError(f"{name} has strides {tensor.stride()}, expected contiguous")
        if scale.dtype is not torch.float32:
            raise ValueError(f"{self._name} is {scale.dtype}, expected torch.float32")
        if block is None:
            fits = scale.numel() == 1 or scale.shape in ((N,), (N, 1))
            expected = f"[], [{N}] or [{N}, 1]"
        else:
            rows, columns = block
            if not (1 <= rows <= MOST and 1 <= columns <= MOST):
                raise ValueError(f"block is {rows} x {columns}, expected 1 to {MOST} each")
            shape = [-(-N // rows), -(-K // columns)]
            fits, expected = list(scale.shape) == shape, f"{shape}, of blocks of {rows} x {columns}"
        if not fits:
            raise ValueError(
                f"{self._name} has shape {list(scale.shape)}, expected {expected}: "
                f"the weight is {N} x {K}"
            )

    @classmethod
    def of(cls, weight: Tensor) -> "EightBit":
        """The nearest to a weight ``[N, K]``; a row's greatest magnitude becomes the greatest code."""
        rows, greatest = _rows_of(weight)
        integers = cls.code_dtype is torch.int8
        last = 127.0 if integers else torch.finfo(cls.code_dtype).max
        # By a tensor: on a GPU PyTorch divides by a number as it multiplies by its inverse.
        scale = greatest / torch.full_like(greatest, last)
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
        codes = rows / scale[:, None]
        codes = codes.round().clamp(-last, last) if integers else codes.clamp(-last, last)
        codes = codes.to(cls.code_dtype).contiguous()
        if not integers:  # bytes, which nothing takes for numbers to be cast
            codes = codes.view(torch.uint8)
        return cls({"weight": codes, "scale": scale}, weight.dtype)

    def like(self, weight: Tensor) -> "EightBit":
        """``weight`` with a scale each row, as this one must have; ``SCB`` if this has."""
        if self.block is not None or self.scale.numel() != self.shape[0]:
            raise ValueError(f"nothing quantizes to {self.format} but with a scale each row")
        tensors = dict(self._made_of(weight).tensors())
        tensors[self._name] = tensors.pop(next(n for n in self.names if n in tensors)).reshape(
            self.scale.shape
        )
        return type(self)(tensors, self.stored_dtype).to(self.dtype)  # type: ignore[return-value]

    def _made_of(self, weight: Tensor) -> "EightBit":
        """``weight`` with scales in the unit of this one's."""
        return self.of(weight)

    def split(self, dim: int, parts: int) -> Split:
        """A part has whole blocks of scales."""
        self._check_split(dim, parts, 1 if self.block is None else self.block[dim])
        one = self.block is None and self.scale.numel() == 1
        of_scale = None if one or (self.block is None and dim == 1) else dim
        tensors = {n: t.detach().as_subclass(Tensor) for n, t in self._tensors.items()}
        return Split(tensors, {"weight": dim, self._name: of_scale}, *[self.parameters] * 2)

    def tensors(self) -> Mapping[str, Tensor]:
        """``weight``, and ``scale`` or what else that is called."""
        return self._tensors

    @classmethod
    def build(cls, tensors: Mapping[str, Tensor], parameters: str) -> "EightBit":
        """From ``tensors()`` and ``parameters``, which is "dtype", and ",rows x columns" of a block."""
        try:
            name, *blocks = parameters.split(",")
            (block,) = blocks or ("",)
            dtype = getattr(torch, name)
            sizes = tuple(map(int, block.split("x"))) if block else None
            if sizes is not None and len(sizes) != 2:
                raise ValueError
        except (ValueError, AttributeError):
            raise ValueError(
                f"weight is said to be {parameters!r}, expected a dtype, as 'bfloat16', and a block, as "
                "'bfloat16,128x128'"
            ) from None
        return cls(tensors, dtype, sizes and (sizes[0], sizes[1]))

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows of W, dense."""
        codes = self._tensors["weight"][begin:end]
        if codes.dtype is not self.code_dtype:
            codes = codes.view(self.code_dtype)
        scaled = codes.float() * self._scales(begin, end)
        return scaled.to(self.stored_dtype).to(self.dtype)

    @property
    def scale(self) -> Tensor:
        """The scales, float32."""
        return self._tensors[self._name]

    @property
    def unit(self) -> float:
        """What they are multiplied by."""
        return self.names[self._name]

    def _scales(self, begin: int, end: int) -> Tensor:
        """Those of rows, as they multiply them."""
        scale = self.scale * self.unit
        if self.block is not None:
            rows, columns = self.block
            of_rows = torch.arange(begin, end, device=scale.device) // rows
            of_columns = torch.arange(self.shape[1], device=scale.device) // columns
            return scale[of_rows[:, None], of_columns]
        if scale.numel() == 1 != self.shape[0] or scale.dim() == 0:
            return scale.reshape(1, 1)
        return scale.reshape(-1, 1)[begin:end]


class Int8(EightBit):
    """8-bit integers. Those that bitsandbytes has made have ``SCB [N]``, 127 times the scale."""

    format = "int8"
    code_dtype = torch.int8
    names: ClassVar[Mapping[str, float]] = {"SCB": 1.0 / 127.0, "scale": 1.0}

    @classmethod
    def with_scb(cls, weight: Tensor) -> "Int8":
        """The nearest to a weight ``[N, K]``, with ``SCB``: codes as bitsandbytes' ``Linear8bitLt``
        makes them of 16 bits; of float32 it rounds to float16 first. A row of zeros stays one."""
        rows, greatest = _rows_of(weight)
        codes = (rows * (127.0 / greatest.clamp(min=_LEAST))[:, None]).round().clamp(-127, 127)
        made = cls({"weight": codes.to(torch.int8).contiguous(), "SCB": greatest}, torch.float32)
        return made.to(weight.dtype)  # type: ignore[return-value]

    def _made_of(self, weight: Tensor) -> EightBit:
        return self.with_scb(weight) if self._name == "SCB" else self.of(weight)


class FP8(EightBit):
    """8-bit floats, e4m3 without infinities. Checkpoints as DeepSeek's have ``weight_scale_inv``, which
    is the scale."""

    format = "fp8"
    code_dtype = torch.float8_e4m3fn
    names: ClassVar[Mapping[str, float]] = {"weight_scale_inv": 1.0, "scale": 1.0}


WHO_CASTS = (
    ": if FSDP's MixedPrecisionPolicy has cast it, shard this layer without a param_dtype (its shards "
    "are as they were)"
)
_LEAST = 1e-38
"""What a row of zeros is divided by."""


def _are_two_sizes(block: object) -> bool:
    both = isinstance(block, list | tuple) and len(block) == 2
    return both and all(type(size) is int for size in block)  # type: ignore[attr-defined]


def _rows_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a weight ``[N, K]`` and the greatest magnitude of each, float32."""
    check_quantizable(weight)
    rows = weight.detach().float()
    return rows, rows.abs().amax(1) if rows.numel() else rows.new_zeros(rows.shape[0])
