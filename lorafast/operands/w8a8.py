"""The format ``w8a8``: W in fp8, and the activations that it multiplies rounded to fp8 as well.

``y = (qx ⊙ scale_x)·Wᵀ``: row m of x is ``qx[m]`` in e4m3 times ``scale_x[m] = max |x[m]| / 448``. It
changes numbers, so that it is never chosen by itself.
"""

import functools

import torch
from torch import Tensor

from lorafast.operands.eight_bit import FP8
from lorafast.operands.operand import Split

_E4M3 = torch.float8_e4m3fn
_MOST = torch.finfo(_E4M3).max
_LEAST = torch.finfo(torch.float32).tiny
_STEP = 16
"""K and N of the vendor's scaled products are multiples of it."""
_ADA = (8, 9)
"""The compute capability from which tensor cores multiply e4m3."""


class W8A8(FP8):
    """As ``FP8``, multiplied in 8 bits: x is rounded to e4m3, a scale each row, in every forward.

    The backward is that of W made dense and of x as it was (a straight-through estimator), and the
    adapter's own products read x as it was. In bfloat16, with a scale each row of W or one, with K and N
    multiples of 16, the product is the vendor's scaled one, on CPUs and from compute capability 8.9;
    elsewhere the rounded x is multiplied by W made dense.
    """

    format = "w8a8"

    def activations(self, x: Tensor) -> Tensor:
        """What W multiplies in the place of ``x [..., K]``, in the dtype of x."""
        codes, scale = _rounded(x)
        return (codes.float() * scale).to(x.dtype)

    def split(self, dim: int, parts: int) -> Split:
        """Rows alone: the scale of an x is that of all its columns."""
        if dim == 1:
            raise ValueError(
                f"is stored as {self.format}, whose scales of x are of all its columns"
            )
        return super().split(dim, parts)

    def unrounded(self) -> FP8:
        """The weight in ``fp8``."""
        plain: FP8 = FP8(self._tensors, self.stored_dtype, self.block).to(self.dtype)  # type: ignore[assignment]
        return plain

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x·Wᵀ + bias`` of the rounded x."""
        if not self._is_scaled(x):
            return super().linear(self.activations(x), bias)
        codes, scale = _rounded(x)
        y = torch._scaled_mm(
            codes, self._codes().t(), scale_a=scale, scale_b=self._of_rows(), out_dtype=x.dtype
        )
        return y if bias is None else y.add_(bias)

    def _is_scaled(self, x: Tensor) -> bool:
        """Whether the vendor's product serves it."""
        (M, K), N = x.shape, self.shape[0]
        if not M or self.block is not None or K % _STEP or N % _STEP or not K * N:
            return False
        if not x.dtype is self.stored_dtype is torch.bfloat16:
            return False
        return x.device.type == "cpu" or (x.is_cuda and _multiplies(x.device))

    def _codes(self) -> Tensor:
        codes = self._tensors["weight"]
        return codes if codes.dtype is _E4M3 else codes.view(_E4M3)

    def _of_rows(self) -> Tensor:
        """The scales as the vendor's product takes them, ``[1, N]``."""
        N = self.shape[0]
        return self.scale.reshape(1, -1).expand(1, N).contiguous()


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 ``[..., K]`` and the scale of each row, ``[..., 1]``, float32."""
    wide = x.float()
    if not x.shape[-1]:
        return wide.to(_E4M3), wide.new_ones((*x.shape[:-1], 1))
    scale = (wide.abs().amax(-1, keepdim=True) / _MOST).clamp(min=_LEAST)
    return (wide / scale).clamp(-_MOST, _MOST).to(_E4M3), scale


@functools.cache
def _multiplies(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= _ADA
