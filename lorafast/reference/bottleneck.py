"""``y = residual + scaling · (f(h·Dᵀ + d)·Uᵀ + u)``, a bottleneck adapter, and its backward."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafast.core.dtypes import wide

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""``dh``, ``dD``, ``dd``, ``dU``, ``du``."""


def bottleneck(
    h: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    scaling: float = 1.0,
    activation: str = "gelu",
    residual: Tensor | None = None,
) -> Tensor:
    """``y = residual + scaling · (f(h·Dᵀ + d)·Uᵀ + u)`` (Houlsby et al., 2019; He et al., 2022).

    Shapes: ``h [..., K]``, ``down [b, K]``, ``down_bias [b]``, ``up [N, b]``, ``up_bias [N]``,
    ``residual [..., N]``, by default ``h`` → ``y [..., N]`` in the dtype of ``h``. Differentiable by
    PyTorch's own autograd, any number of times.
    """
    low = wide(h.dtype)
    z = activate(pre_activation(h, down, down_bias), activation)
    change = z @ up.to(low).t()
    if up_bias is not None:
        change = change + up_bias.to(low)
    return ((h if residual is None else residual).to(low) + scaling * change).to(h.dtype)


def pre_activation(h: Tensor, down: Tensor, down_bias: Tensor | None) -> Tensor:
    """``a = h·Dᵀ + d`` in the dtype of the low-rank term."""
    low = wide(h.dtype)
    a = h.to(low) @ down.to(low).t()
    return a if down_bias is None else a + down_bias.to(low)


def bottleneck_backward(
    dy: Tensor,
    h: Tensor,
    a: Tensor,
    down: Tensor,
    up: Tensor,
    scaling: float = 1.0,
    activation: str = "gelu",
    residual: bool = False,
) -> Gradients:
    """``da = scaling · dy·U ⊙ f'(a)`` and what follows from it.

        dh = dy + da·D,  dD = daᵀ·h,  dd = Σ da,  dU = scaling · dyᵀ·f(a),  du = scaling · Σ dy

    Shapes: ``dy [M, N]``, ``h [M, K]``, ``a [M, b]``, ``down [b, K]``, ``up [N, b]`` → ``dh [M, K]`` in
    the dtype of ``h``, the others in that of ``down``. With another ``residual`` than h, whose gradient
    is dy, ``dh = da·D``.
    """
    low, dtype = wide(dy.dtype), down.dtype
    wide_dy = dy.to(low)
    da = activate_backward(scaling * (wide_dy @ up.to(low)), a, activation)
    dh = da @ down.to(low)
    if not residual:
        dh = wide_dy + dh
    dD, dU = da.t() @ h.to(low), scaling * (wide_dy.t() @ activate(a, activation))
    dd, du = da.sum(0), scaling * wide_dy.sum(0)
    return dh.to(dy.dtype), dD.to(dtype), dd.to(dtype), dU.to(dtype), du.to(dtype)


def activate(a: Tensor, activation: str) -> Tensor:
    """``f(a)``, element by element."""
    if activation == "gelu":
        return F.gelu(a)
    if activation == "gelu_tanh":
        return F.gelu(a, approximate="tanh")
    if activation == "relu":
        return F.relu(a)
    if activation == "silu":
        return F.silu(a)
    assert activation == "tanh", activation
    return torch.tanh(a)


def activate_backward(dz: Tensor, a: Tensor, activation: str) -> Tensor:
    """``dz ⊙ f'(a)``."""
    if activation == "gelu":
        density = torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
        return dz * (0.5 * (1 + torch.erf(a / math.sqrt(2))) + a * density)
    if activation == "gelu_tanh":
        slope = math.sqrt(2 / math.pi)
        t = torch.tanh(slope * (a + 0.044715 * a**3))
        inner = slope * (1 + 3 * 0.044715 * a * a)
        return dz * (0.5 * (1 + t) + 0.5 * a * (1 - t * t) * inner)
    if activation == "relu":
        return torch.where(a <= 0, 0.0, dz)
    if activation == "silu":
        gate = torch.sigmoid(a)
        return dz * gate * (1 + a * (1 - gate))
    assert activation == "tanh", activation
    return dz * (1 - torch.tanh(a) ** 2)
