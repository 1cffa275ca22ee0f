"""``y = l ⊙ (x·Wᵀ + b)`` or ``y = (l ⊙ x)·Wᵀ + b``, a frozen layer with a vector, and its gradients."""

import torch
from torch import Tensor


def scaled_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    scales_input: bool = False,
) -> Tensor:
    """``y = l ⊙ (x·Wᵀ + b)``, with ``scales_input`` ``y = (l ⊙ x)·Wᵀ + b`` ((IA)³, Liu et al., 2022).

    Shapes: ``x [..., K]``, ``weight [N, K]``, ``bias [N]``, ``scale [N]``, with ``scales_input``
    ``[K]`` → ``y [..., N]`` in the dtype of ``x``. Differentiable by PyTorch's own autograd, any number
    of times.
    """
    if scales_input:
        x = (x * scale).to(x.dtype)
    y = x @ weight.t()
    if bias is not None:
        y = y + bias
    return y if scales_input else (y * scale).to(x.dtype)


def scaled_dx(dy: Tensor, weight: Tensor, scale: Tensor, scales_input: bool = False) -> Tensor:
    """``dx = (l ⊙ dy)·W``, with ``scales_input`` ``dx = l ⊙ (dy·W)``.

    Shapes: ``dy [M, N]``, ``weight [N, K]``, ``scale`` as above → ``dx [M, K]`` in the dtype of ``dy``.
    """
    if scales_input:
        return ((dy @ weight) * scale).to(dy.dtype)
    return (dy * scale).to(dy.dtype) @ weight


def scaled_dscale(
    dy: Tensor,
    kept: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    scales_input: bool = False,
) -> Tensor:
    """``dl = Σ dy ⊙ z`` over the rows, with ``scales_input`` ``dl = Σ x ⊙ (dy·W)``.

    Shapes: ``dy [M, N]``, ``kept [M, N]`` for ``z = x·Wᵀ + b``, with ``scales_input`` ``[M, K]`` for x,
    ``weight [N, K]``, which is read with ``scales_input`` alone → ``[N]`` or ``[K]`` in ``dtype``.
    """
    if scales_input:
        assert weight is not None
        dy = dy @ weight
    wide = torch.promote_types(dy.dtype, torch.float32)
    return (dy.to(wide) * kept).sum(0).to(dtype)
