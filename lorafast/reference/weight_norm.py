"""``‖W + scaling · B·A‖`` of each row."""

import torch
from torch import Tensor

from lorafast.core.dtypes import LEAST_NORM


def weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
    """``‖W + scaling · B·A‖`` of each row, by which DoRA divides (Liu et al., "DoRA", 2024).

    Shapes: ``weight [N, K]``, ``lora_A [r, K]``, ``lora_B [N, r]`` → ``[N]``, in float32 (float64 of a
    float64 weight), at least ``LEAST_NORM``. No gradient flows through it: section 4.3 of the paper.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    changed = weight.to(dtype) + scaling * (lora_B.to(dtype) @ lora_A.to(dtype))
    return torch.linalg.vector_norm(changed, dim=1).clamp_min(LEAST_NORM).detach()
