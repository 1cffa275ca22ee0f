"""AdaLoRA (Zhang et al., 2023): LoRA as a decomposition P·Λ·Q, whose rank is allocated in training.

``y = base + scaling/rank · ((drop(x)·Aᵀ) ⊙ E)·Bᵀ``: the singular values are folded into B,
or multiply the products of a small call. A, B and E
have their gradients by name, which PEFT's ``update_and_allocate`` reads.
"""

from typing import Any

import torch
from torch import Tensor

from lorafast.integrations.peft import low_rank
from lorafast.integrations.peft.low_rank import Kind, Part, Term


def parts(layer: Any) -> list[Part]:
    """The active adapters."""
    names = ("lora_A", "lora_B", "lora_E")
    every_A, every_B, every_E = (low_rank.entries(layer, name) for name in names)
    dropouts = layer._modules["lora_dropout"]._modules
    return [
        Part(
            name,
            {"lora_A": every_A[name], "lora_B": every_B[name], "lora_E": every_E[name]},
            dropouts[name],
        )
        for name in low_rank.active(layer)
        if name in every_A
    ]


def why_not(layer: Any, part: Part, N: int, K: int) -> str | None:
    """Why an adapter doesn't fit a layer of W [N, K]."""
    r = part.tensors["lora_A"].shape[0]
    if r == 0:
        return "has the rank 0"
    rank = low_rank.entries(layer, "ranknum")[part.name]
    if type(rank) is not torch.nn.Parameter:
        return f"has a {type(rank).__name__} for its rank"
    scaling = layer.scaling[part.name]
    if isinstance(scaling, Tensor) and scaling.dim() > 0:
        return f"has a scaling of the shape {list(scaling.shape)}"
    return low_rank.why_not_shapes(part, lora_A=(r, K), lora_B=(N, r), lora_E=(r, 1))


def term(layer: Any, part: Part, N: int, K: int, small: bool) -> Term:
    """A, B and E, which has the rank and the scaling too: the host doesn't wait for their values."""
    found, rank = part.tensors, low_rank.entries(layer, "ranknum")[part.name]
    A, B, E = found["lora_A"], found["lora_B"], found["lora_E"].flatten()
    scaling = layer.scaling[part.name]
    if small and rank.is_cpu and not rank.requires_grad and not isinstance(scaling, Tensor):
        return Term(A, B, scaling / (float(rank) + 1e-5), part.dropout, E)
    wide = torch.promote_types(rank.dtype, torch.float32)
    return Term(A, B, 1.0, part.dropout, E * (scaling / (rank.to(wide) + 1e-5)))


def _dtype_of_rank(layer: Any, part: Part) -> torch.dtype:
    """Over 8 bits PEFT divides by the rank in the dtype of that, which its result then has too."""
    found: torch.dtype = low_rank.entries(layer, "ranknum")[part.name].dtype
    return found


ADALORA = Kind(parts, why_not, term, as_input=False)
ADALORA_8BIT = Kind(parts, why_not, term, as_input=False, wider=_dtype_of_rank)
