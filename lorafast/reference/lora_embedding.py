"""``y = W[x] + scaling · Aᵀ[x]·Bᵀ``, the LoRA embedding."""

import torch.nn.functional as F
from torch import Tensor

from lorafast.core.dtypes import wide


def lora_embedding(
    tokens: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    padding_idx: int | None = None,
) -> Tensor:
    """``y = W[x] + scaling · Aᵀ[x]·Bᵀ`` (Hu et al., "LoRA", 2021, over a table of V rows).

    Shapes: ``tokens [...]``, ``weight [V, N]``, ``lora_A [r, V]``, ``lora_B [N, r]`` → ``y [..., N]`` in
    the dtype of ``weight``. The row ``padding_idx`` of W and of Aᵀ is read, and has no gradient.
    Differentiable by PyTorch's own autograd, any number of times.
    """
    low = wide(weight.dtype)
    s = F.embedding(tokens, lora_A.t(), padding_idx).to(low)
    y = F.embedding(tokens, weight, padding_idx)
    return (y + scaling * (s @ lora_B.to(low).t())).to(weight.dtype)
