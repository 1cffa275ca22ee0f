"""The LoRA linear layer of a batch whose elements have adapters of their own: a loop over adapters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorafast.core.dtypes import wide
from lorafast.reference.lora_linear import lora_linear
from lorafast.reference.shrink import shrink


def grouped_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    adapter_of: Sequence[int] | Tensor,
    bias: Tensor | None = None,
    activations: Tensor | None = None,
) -> Tensor:
    """``y_i = x_i·Wᵀ + scaling[g_i] · (x_i·A[g_i]ᵀ)·B[g_i]ᵀ + bias`` with ``g = adapter_of``.

    Shapes: ``x [..., K]``, ``weight [N, K]``, ``lora_A [n, r, K]``, ``lora_B [n, N, r]``,
    ``scaling [n]`` or a number, ``bias [N]`` → ``y [..., N]``. ``adapter_of``: integers from -1 (none)
    to ``n - 1``, a tensor of the leading dimensions of ``x`` or of the first of them, or a sequence of
    the first. ``activations``: what W multiplies, if that is not x.
    """
    elements, N = as_elements(x, adapter_of), weight.shape[0]
    multiplied = elements if activations is None else as_elements(activations, adapter_of)
    parts, order = [], []
    for g in range(-1, lora_A.shape[0]):
        index = members(adapter_of, g)
        if g < 0:
            own = multiplied[index] @ weight.t()
            parts.append((own if bias is None else own + bias).to(x.dtype))
        else:
            scale = scaling[g] if isinstance(scaling, Tensor) and scaling.dim() else scaling
            own = elements[index]
            parts.append(
                lora_linear(
                    own, weight, lora_A[g], lora_B[g], scale, bias,  # type: ignore[arg-type]
                    activations=multiplied[index],
                )
            )  # fmt: skip
        order.append(index)
    y = torch.cat(parts)[torch.cat(order).argsort()]
    return y.reshape(*x.shape[:-1], N)


def grouped_shrink(x: Tensor, lora_A: Tensor, adapter_of: Sequence[int] | Tensor) -> Tensor:
    """``s_i = x_i·A[g_i]ᵀ``, 0 where there is no adapter.

    Shapes: ``x [M, K]``, ``lora_A [n, r, K]`` → ``s [M, r]``.
    """
    elements, (n, r, _) = as_elements(x, adapter_of), lora_A.shape
    parts, order = [], []
    for g in range(-1, n):
        index = members(adapter_of, g)
        own = elements[index]
        if g < 0:
            parts.append(own.new_zeros((*own.shape[:-1], r), dtype=wide(x.dtype)))
        else:
            s = shrink(own.flatten(0, -2), lora_A[g])
            parts.append(s.view(*own.shape[:-1], r))
        order.append(index)
    return torch.cat(parts)[torch.cat(order).argsort()].reshape(x.shape[0], r)


def as_elements(x: Tensor, adapter_of: Sequence[int] | Tensor) -> Tensor:
    """``x`` as ``[E, T, K]``: ``E`` elements of ``T`` rows, which have an adapter together."""
    E = adapter_of.numel() if isinstance(adapter_of, Tensor) else len(adapter_of)
    M = x.shape[:-1].numel()
    return x.reshape(E, M // max(E, 1), x.shape[-1])


def members(adapter_of: Sequence[int] | Tensor, g: int) -> Tensor:
    """Which elements have the adapter ``g``."""
    if isinstance(adapter_of, Tensor):
        return (adapter_of.flatten() == g).nonzero().flatten()
    return torch.tensor([i for i, of in enumerate(adapter_of) if of == g], dtype=torch.int64)
