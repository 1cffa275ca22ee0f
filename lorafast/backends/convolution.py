"""What a convolution's adapter adds, and its gradients: by PyTorch, or by a backend for its device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafast.backends import forced
from lorafast.core.convolution import Geometry, convolve


class Kernels(NamedTuple):
    """Four functions of a device, each as that of its name in this file, and what says whether they are
    the fastest there are for such arguments.

    ``serves(x, weight, lora_A, lora_B)`` speaks of ``lora_conv``, ``together(dy, x, s, lora_A, lora_B)``
    of its backward; ``shrinks(x, lora_A)`` and ``shrinks_backward(x, lora_A)`` of the two others.
    """

    lora_conv: Callable[..., tuple[Tensor, Tensor | None]]
    lora_conv_backward: Callable[..., tuple[Tensor | None, Tensor, Tensor, Tensor]]
    conv_shrink: Callable[[Tensor, Tensor, Geometry], Tensor]
    conv_shrink_backward: Callable[[Tensor, Tensor, Tensor, Geometry], Tensor]
    serves: Callable[[Tensor, Tensor, Tensor, Tensor], bool]
    together: Callable[..., bool]
    shrinks: Callable[[Tensor, Tensor], bool]
    shrinks_backward: Callable[[Tensor, Tensor], bool]


_kernels: dict[str, tuple[str, Callable[[], Kernels | None]]] = {}


def serve_by(device_type: str, backend: str, kernels: Callable[[], Kernels | None]) -> None:
    """Lets ``kernels`` serve devices of this type where ``backend`` or none is forced: it gives None
    where there are none, and is asked in every call."""
    _kernels[device_type] = backend, kernels


def conv_shrink(x: Tensor, lora_A: Tensor, geometry: Geometry) -> Tensor:
    """``s = conv(x, A)``, ``[batch, r, *size of y]``, of ``x`` and A in one dtype."""
    kernels = _of(x)
    if kernels is not None and kernels.shrinks(x, lora_A):
        return kernels.conv_shrink(x, lora_A, geometry.of_A())
    return convolve(x, lora_A, None, geometry.of_A())


def conv_shrink_backward(
    ds: Tensor, x: Tensor, lora_A: Tensor, geometry: Geometry, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``s = conv(x, A)`` in ``x`` and in A, those that are needed.

    ``x`` is read for that in A alone; for the other its size and strides count.
    """
    geometry, of_x, of_A = geometry.of_A(), *needed
    kernels = _of(x)
    if of_A and kernels is not None and kernels.shrinks_backward(x, lora_A):
        dx = gradients(ds, x, lora_A, geometry, (True, False))[0] if of_x else None
        return dx, kernels.conv_shrink_backward(ds, x, lora_A, geometry)
    return gradients(ds, x, lora_A, geometry, needed)


def lora_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    geometry: Geometry,
    may_merge: bool,
    keep_s: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """``y`` and ``s`` of a layer without groups in one call; None where nothing has that.

    y = conv(x, W) + scaling · B·s + bias. It may merge: y = conv(x, W + scaling · B·A) + bias, and ``s``
    is None unless it is kept.
    """
    kernels = _of(x)
    if kernels is None or not kernels.serves(x, weight, lora_A, lora_B):
        return None
    return kernels.lora_conv(x, weight, bias, lora_A, lora_B, scaling, geometry, may_merge, keep_s)


def lora_conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    s: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    geometry: Geometry,
    may_merge: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor] | None:
    """``dx`` if there is a weight, ``ds``, ``dA`` and ``dB`` in one call; None where nothing has that.

    ds = scaling · conv(dy, Bᵀ), dB = scaling · Σ dy ⊗ s, dA and the low-rank part of dx are of
    ``s = conv(x, A)`` given ds, with ``lora_B [N, r, 1, …]``. It may merge: dx is that of
    ``conv(x, W + scaling · B·A)``.
    """
    kernels = _of(x)
    if kernels is None or not kernels.together(dy, x, s, lora_A, lora_B):
        return None
    return kernels.lora_conv_backward(
        dy, x, weight, s, lora_A, lora_B, scaling, geometry.of_A(), may_merge
    )


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of ``conv(x, W)`` in ``x`` and in W, those that are needed, by PyTorch."""
    stride, padding, dilation, groups = geometry
    none = [0] * len(stride)
    convolution_backward: Any = torch.ops.aten.convolution_backward
    dx, dweight, _ = convolution_backward(
        dy, x, weight, None, stride, padding, dilation, False, none, groups, [*needed, False]
    )  # fmt: skip
    return dx, dweight


def _of(x: Tensor) -> Kernels | None:
    """The kernels that may serve ``x``."""
    served = _kernels.get(x.device.type)
    if served is None or forced.forced() not in (None, served[0]):
        return None
    return served[1]()
