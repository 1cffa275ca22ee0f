"""What a LoRA convolution takes, and its geometry from the arguments of PyTorch's convolutions."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafast.core.convolution import Geometry
from lorafast.core.problem import is_plain
from lorafast.ops.checks import (
    check_device,
    check_float,
    check_not_sharded_alone,
    check_probability,
    check_same_dtype,
    check_shape,
    describe_layout,
    has_rows,
)

_KEPT = 4096
_known: dict[tuple[object, ...], Geometry] = {}
"""The geometry of calls whose arguments fitted, by all that the checks ask."""
_SIZES = {3: "length", 4: "height, width", 5: "depth, height, width"}


def check_lora_conv(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    geometry: Geometry,
    dropout_p: float,
) -> None:
    """Raises ``TypeError`` or ``ValueError`` if the arguments don't make a LoRA convolution."""
    tensors = {"x": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B}
    if bias is not None:
        tensors["bias"] = bias
    check_not_sharded_alone(x, lora_A=lora_A, lora_B=lora_B)
    for name, tensor in tensors.items():
        check_float(name, tensor)
        if not has_rows(tensor):
            raise ValueError(f"{name} is {describe_layout(tensor)}, expected a strided tensor")
    check_kernel(weight)
    N, per_group, *kernel = weight.shape
    groups, C = geometry.groups, per_group * geometry.groups
    if N % groups:
        raise ValueError(f"weight has {N} output channels, expected a multiple of groups, {groups}")
    check_shape("lora_A", lora_A, "r", C, *kernel)
    check_rank_of_groups("lora_A", lora_A.shape[0], groups)
    check_shape("lora_B", lora_B, N, lora_A.shape[0] // groups, *[1] * len(kernel))
    if x.dim() != weight.dim() or x.shape[1] != C:
        raise ValueError(
            f"x has shape {list(x.shape)}, expected [batch, {C}, {_SIZES[weight.dim()]}] or the same "
            f"without a batch: weight has {C} input channels"
        )
    for i, (size, width) in enumerate(zip(x.shape[2:], kernel, strict=True)):
        window = geometry.dilation[i] * (width - 1) + 1
        if size + 2 * geometry.padding[i] < window:
            raise ValueError(
                f"x has shape {list(x.shape)}, too small for a window of {window} in dimension {i + 2} "
                f"with padding {geometry.padding[i]}"
            )
    if bias is not None:
        check_shape("bias", bias, N)
        check_same_dtype("bias", bias, "x", x.dtype)
    check_same_dtype("weight", weight, "x", x.dtype)
    check_same_dtype("lora_B", lora_B, "lora_A", lora_A.dtype)
    for name, tensor in tensors.items():
        check_device(name, tensor, x.device, "x")
    check_probability(dropout_p)
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling is a {type(scaling).__name__}, expected a number")


def check_magnitude(magnitude: Tensor, weight: Tensor, geometry: Geometry) -> None:
    """Raises ``TypeError`` or ``ValueError`` if DoRA can't have this magnitude."""
    if geometry.groups > 1:
        raise ValueError(
            f"groups is {geometry.groups}, expected 1 for DoRA: B·A is no change of a weight in groups"
        )
    check_float("magnitude", magnitude)
    N = weight.shape[0]
    if magnitude.numel() != N or magnitude.shape.numel() != max(magnitude.shape, default=1):
        raise ValueError(
            f"magnitude has shape {list(magnitude.shape)}, expected [{N}], with ones around it or not"
        )
    check_device("magnitude", magnitude, weight.device, "weight")


def check_kernel(weight: Tensor) -> None:
    """``weight`` must be that of a convolution in one to three dimensions, to one channel or more."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight is a {type(weight).__name__}, expected a tensor")
    if weight.dim() not in _SIZES:
        raise ValueError(
            f"weight has shape {list(weight.shape)}, expected [out_channels, in_channels / groups, "
            "*kernel] with a kernel of one to three dimensions"
        )
    if 0 in (weight.shape[0], *weight.shape[2:]):
        raise ValueError(
            f"weight has shape {list(weight.shape)}, expected at least one output channel and a kernel "
            "of at least 1"
        )


def check_rank_of_groups(name: str, r: int, groups: int) -> None:
    """r must be a positive multiple of ``groups``: B is a product in each group."""
    if r < 1:
        raise ValueError(f"the rank r of {name} is 0, expected at least 1")
    if r % groups:
        raise ValueError(
            f"the rank r of {name} is {r}, expected a multiple of groups, {groups}: B has a part of the "
            "rank for each group"
        )


def known_geometry(key: tuple[object, ...] | None) -> Geometry | None:
    """The geometry of a call like one that fitted before, or None."""
    return None if key is None else _known.get(key)


def remember(key: tuple[object, ...] | None, geometry: Geometry) -> None:
    """The arguments fitted."""
    if key is not None:
        if len(_known) >= _KEPT:
            _known.clear()
        _known[key] = geometry


def key_of(
    tensors: tuple[Tensor, ...],
    bias: Tensor | None,
    scaling: object,
    windows: tuple[Any, ...],
    dropout_p: float,
) -> tuple[object, ...] | None:
    """What the checks of a call ask; None of tensors of other classes and in compiled code.

    ``windows``: stride, padding, dilation and groups as they were given; as text, which tells 1 from
    1.0 and True.
    """
    if torch.compiler.is_compiling():
        return None
    given = tensors if bias is None else (*tensors, bias)
    try:
        if not is_plain(*given):
            return None
        key = (
            *[(t.shape, t.dtype) for t in given], bias is None, type(scaling), repr(windows), dropout_p,
        )  # fmt: skip
        hash(key)
    except (AttributeError, RuntimeError, TypeError):
        return None  # no tensors, or nested ones
    return key


def geometry_of(
    x: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[Tensor, Geometry]:
    """The geometry, and ``x``, padded where ``"same"`` is one more on one side than on the other.

    Raises:
        TypeError, ValueError: an argument is none of a convolution's.
    """
    check_kernel(weight)
    n = weight.dim() - 2
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups is {groups!r}, expected an integer of at least 1")
    strides = _numbers("stride", stride, n, 1)
    dilations = _numbers("dilation", dilation, n, 1)
    if not isinstance(padding, str):
        return x, Geometry(strides, _numbers("padding", padding, n, 0), dilations, groups)
    if padding not in ("same", "valid"):
        raise ValueError(f"padding is {padding!r}, expected 'same', 'valid' or numbers")
    if padding == "valid":
        return x, Geometry(strides, (0,) * n, dilations, groups)
    if any(one != 1 for one in strides):
        raise ValueError(f"stride is {stride}, expected 1 with padding 'same'")
    total = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
    if any(one % 2 for one in total):
        x = F.pad(x, [side for one in reversed(total) for side in (0, one % 2)])
    return x, Geometry(strides, tuple(one // 2 for one in total), dilations, groups)


def _numbers(name: str, value: Any, n: int, least: int) -> tuple[int, ...]:
    """``value`` for each of ``n`` dimensions."""
    numbers = (value,) * n if isinstance(value, int) else value
    try:
        numbers = tuple(numbers)
        fits = all(
            isinstance(one, int) and not isinstance(one, bool) and one >= least for one in numbers
        )
    except TypeError:
        fits = False
    if fits and len(numbers) == 1:
        numbers = numbers * n
    if not fits or len(numbers) != n:
        raise ValueError(f"{name} is {value!r}, expected {n} integers of at least {least}, or one")
    return numbers
