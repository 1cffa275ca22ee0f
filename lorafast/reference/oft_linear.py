"""The OFT linear layer: x is rotated by a block-diagonal matrix, made here."""

import torch
from torch import Tensor


def oft_linear(x: Tensor, weight: Tensor, blocks: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = (x·diag(R_1 … R_b))·Wᵀ + bias`` (Qiu et al., "OFT", 2023).

    Shapes: ``x [..., b·k]``, ``weight [N, b·k]``, ``blocks [b, k, k]``, ``bias [N]`` → ``y [..., N]`` in
    the dtype of ``x``, to which ``x·R`` is rounded. Differentiable by PyTorch's own autograd.
    """
    R = torch.block_diag(*blocks)
    low = torch.promote_types(x.dtype, R.dtype)
    y = (x.to(low) @ R.to(low)).to(x.dtype) @ weight.t()
    return y if bias is None else y + bias
