"""The format ``mxfp4``: E2M1 elements, 32 of which share a power of two (OCP Microscaling Formats 1.0).

As gpt-oss stores them: ``W[n, k] = numbers[code] · 2^(exponent[n, k // 32] − 127)``; a byte has the
codes of two neighbours, the first of them in its lower half. 255 as an exponent is NaN.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorafast.core.codebooks import E2M1, codebook
from lorafast.core.dtypes import FLOATS
from lorafast.operands.operand import Operand, Split, check_tensors

BLOCK = 32
"""Elements of a row that share an exponent."""
_NAMES = ("blocks", "scales")
_LEAST = 1 << 22
"""The bits of 2⁻¹²⁷ as a float32: it is not normal."""
_QUIET = 1 << 22
"""What makes a NaN of the bits of infinity."""


class MXFP4(Operand):
    """W ``[N, K]``, K a multiple of 32, stored as ``blocks`` uint8, N·K / 2 bytes whose first dimension
    is N, and ``scales`` uint8 ``[N, K / 32]``, the exponents.

    Raises:
        ValueError: the tensors don't fit; the message names the one, what it is, what was expected.
    """

    format = "mxfp4"
    keeps_dtypes = True
    stored_dtype: torch.dtype
    """What W is rounded to, whatever ``to`` has made ``dtype``."""

    def __init__(self, blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        check_tensors({"blocks": blocks, "scales": scales}, _NAMES)
        if dtype not in FLOATS:
            raise ValueError(f"weight is of {dtype}, expected a float dtype")
        if scales.dtype is not torch.uint8 or scales.dim() != 2:
            raise ValueError(
                f"scales are {scales.dtype} {list(scales.shape)}, expected torch.uint8 [N, K / {BLOCK}]"
            )
        N, K = scales.shape[0], scales.shape[1] * BLOCK
        if (
            blocks.dtype is not torch.uint8
            or blocks.shape[:1] != (N,)
            or blocks.numel() != N * K // 2
        ):
            raise ValueError(
                f"blocks are {blocks.dtype} {list(blocks.shape)}, expected torch.uint8 [{N}, {K // 2}]: "
                f"the scales are {list(scales.shape)}"
            )
        for name, tensor in (("blocks", blocks), ("scales", scales)):
            if not tensor.is_contiguous():
                raise ValueError(f"{name} have strides {tensor.stride()}, expected contiguous")
        self.blocks, self.scales = blocks, scales
        self.shape = torch.Size((N, K))
        self.dtype = self.stored_dtype = dtype
        self.parameters = str(dtype).removeprefix("torch.")

    def tensors(self) -> Mapping[str, Tensor]:
        """``blocks`` and ``scales``."""
        return {"blocks": self.blocks, "scales": self.scales}

    def split(self, dim: int, parts: int) -> Split:
        """A part has whole blocks of 32."""
        self._check_split(dim, parts, (1, BLOCK)[dim])
        N, blocks = self.scales.shape
        codes = self.blocks.detach().reshape(N, blocks * (BLOCK // 2))
        tensors = {"blocks": codes, "scales": self.scales.detach()}
        return Split(tensors, dict.fromkeys(tensors, dim), *[self.parameters] * 2)

    @classmethod
    def build(cls, tensors: Mapping[str, Tensor], parameters: str) -> "MXFP4":
        """From ``tensors()`` and ``parameters``, the name of the dtype."""
        dtype = getattr(torch, parameters, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(
                f"weight is said to be {parameters!r}, expected a dtype, as 'bfloat16'"
            )
        check_tensors(tensors, _NAMES)
        return cls(tensors["blocks"], tensors["scales"], dtype)

    def factors(self, begin: int, end: int) -> Tensor:
        """The powers of two of rows, ``[end - begin, K / 32]`` float32."""
        exponents = self.scales[begin:end].int()
        ends = (exponents == 0).int() * _LEAST + (exponents == 255).int() * _QUIET
        return ((exponents << 23) + ends).view(torch.float32)

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows of W, dense."""
        K = self.shape[1]
        codes = self.blocks[begin:end].reshape(end - begin, K // 2)
        both = torch.stack((codes & 15, codes >> 4), dim=2).reshape(end - begin, K // BLOCK, BLOCK)
        W = codebook(E2M1, codes)[both.int()] * self.factors(begin, end)[:, :, None]
        return W.reshape(end - begin, K).to(self.stored_dtype).to(self.dtype)
