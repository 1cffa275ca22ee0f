"""Refusals of what makes no bottleneck adapter, a sentence each."""

from typing import Any

from torch import Tensor

from lorafast.core.problem import ACTIVATIONS
from lorafast.ops.checks import (
    check_device,
    check_float,
    check_matrix,
    check_not_sharded_alone,
    check_same_dtype,
    check_shape,
    describe_layout,
    has_rows,
)


def check_bottleneck(
    h: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    scaling: float,
    activation: str,
    residual: Tensor | None,
) -> None:
    """Raises ``TypeError`` or ``ValueError`` if the arguments don't make a bottleneck adapter."""
    given: dict[str, Any] = {
        "h": h, "down": down, "up": up, "down_bias": down_bias, "up_bias": up_bias,
        "residual": residual,
    }  # fmt: skip
    needed = ("h", "down", "up")
    check_not_sharded_alone(h, down=down, up=up)
    tensors = {name: t for name, t in given.items() if t is not None or name in needed}
    for name, tensor in tensors.items():
        check_float(name, tensor)
        if not has_rows(tensor):
            raise ValueError(f"{name} is {describe_layout(tensor)}, expected a strided tensor")
    check_activation(activation)
    check_matrix("down", down, "b", "K")
    b, K = down.shape
    if b == 0:
        raise ValueError(f"down has shape [0, {K}]: the bottleneck b is 0, expected at least 1")
    check_matrix("up", up, "N", b)
    N = up.shape[0]
    if h.dim() == 0 or h.shape[-1] != K:
        raise ValueError(
            f"h has shape {list(h.shape)}, expected [..., {K}]: down has {K} input features"
        )
    _check_residual(h, residual, N)
    if (down_bias is None) != (up_bias is None):
        missing, there = "up_bias", "down_bias"
        if down_bias is None:
            missing, there = there, missing
        raise ValueError(f"{missing} is None and {there} is not, expected both or neither")
    if down_bias is not None and up_bias is not None:
        check_shape("down_bias", down_bias, b)
        check_shape("up_bias", up_bias, N)
    for name, tensor in tensors.items():
        if name not in ("h", "residual"):
            check_same_dtype(name, tensor, "down", down.dtype)
        check_device(name, tensor, h.device, "h")
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling is a {type(scaling).__name__}, expected a number")


def _check_residual(h: Tensor, residual: Tensor | None, N: int) -> None:
    if residual is None:
        if h.shape[-1] != N:
            raise ValueError(
                f"up has {N} output features and h has {h.shape[-1]}, expected as many: the change is "
                "added to h (or give residual)"
            )
        return
    expected = [*h.shape[:-1], N]
    if list(residual.shape) != expected:
        raise ValueError(f"residual has shape {list(residual.shape)}, expected {expected}")
    check_same_dtype("residual", residual, "h", h.dtype)


def check_activation(activation: object) -> None:
    """``activation`` must be the name of one that there is."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
