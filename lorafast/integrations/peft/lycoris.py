"""What LoHa and LoKr share, which PEFT has from LyCORIS: scaling, and what training leaves out."""

from typing import Any

import torch
from torch import Tensor


def why_not_scaling(layer: Any, name: str) -> str | None:
    """Why an adapter's scaling isn't a number, as the end of a sentence, or None."""
    scaling = layer.scaling[name]
    return None if type(scaling) in (float, int) else f"has a {type(scaling).__name__} for scaling"


def takes_part(layer: Any, name: str) -> bool:
    """Whether ``module_dropout`` leaves the adapter in; drawn as PEFT draws it."""
    p = layer.module_dropout[name]
    if not layer.training or (p == 0.0 and torch.compiler.is_compiling()):
        return True
    return bool(torch.rand(1) > p)


def drops_rows(layer: Any, name: str) -> bool:
    """Whether ``rank_dropout`` leaves out rows of ΔW."""
    return bool(layer.training and layer.rank_dropout[name])


def kept_rows(layer: Any, name: str, N: int, device: torch.device) -> Tensor | None:
    """``[N]`` of zeros and ones: the rows of ΔW that ``rank_dropout`` keeps, as PEFT draws them."""
    if not drops_rows(layer, name):
        return None
    return (torch.rand(N) > layer.rank_dropout[name]).to(torch.float32).to(device)
