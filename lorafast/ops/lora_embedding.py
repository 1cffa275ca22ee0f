"""``y = W[x] + scaling · Aᵀ[x]·Bᵀ``: contract and computation.

Not a registered operation: two gathers and a product, which PyTorch compiles, batches and differentiates
itself, any number of times, and of which it keeps the tokens, s and B.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafast.core.context import without_autocast
from lorafast.ops.checks import (
    check_device,
    check_float,
    check_matrix,
    check_not_sharded_alone,
    check_same_dtype,
    describe_layout,
    has_rows,
)

_INDICES = (torch.int64, torch.int32)
_INTEGERS = (
    *_INDICES, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


def lora_embedding(
    tokens: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    padding_idx: int | None = None,
) -> Tensor:
    """``y = W[x] + scaling · Aᵀ[x]·Bᵀ``, as ``functional.lora_embedding``."""
    _check(tokens, weight, lora_A, lora_B, scaling, padding_idx)
    if tokens.dtype not in _INDICES:
        tokens = tokens.long()
    y = F.embedding(tokens, weight, padding_idx)
    y = add_low_rank(y, tokens, lora_A, lora_B, scaling, padding_idx)
    return y.to(weight.dtype)


def add_low_rank(
    y: Tensor,
    tokens: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    padding_idx: int | None = None,
) -> Tensor:
    """``y + scaling · Aᵀ[x]·Bᵀ`` for ``y [..., N]``, of arguments that fit.

    In the dtype of ``y``, but float32 for a float16 ``y`` and other adapters: what these make and its
    gradients may not fit into float16.
    """
    if isinstance(scaling, Tensor) or torch.compiler.is_compiling():
        # A tensor's value must not be asked for, nor a number's by a graph that is to hold for another.
        lora_B, scaling = lora_B * scaling, 1.0
    dtype = sum_dtype(y, lora_B)
    s = shrunk(tokens, lora_A, padding_idx)
    rows = y.reshape(s.shape[0], y.shape[-1]).to(dtype)  # [M, N]
    with without_autocast(rows):
        rows = torch.addmm(rows, s.to(dtype), lora_B.t().to(dtype), alpha=float(scaling))
    return rows.reshape(y.shape)


def sum_dtype(y: Tensor, lora_B: Tensor) -> torch.dtype:
    """The dtype in which low-rank terms are added to ``y``: its own, or float32 as ``add_low_rank``."""
    narrow = y.dtype is torch.float16 and lora_B.dtype is not torch.float16
    return torch.float32 if narrow else y.dtype


def shrunk(tokens: Tensor, lora_A: Tensor, padding_idx: int | None = None) -> Tensor:
    """``s = Aᵀ[x]``, ``[M, r]``: a row for each token."""
    index = tokens.reshape(-1)
    if padding_idx is None and index.device.type == "cpu":
        # Its gradient is not [V, r], to be transposed. Contiguous: MKL sums columns less exactly.
        return lora_A.index_select(1, index).t().contiguous()
    return F.embedding(index, lora_A.t(), padding_idx)


def _check(
    tokens: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    padding_idx: int | None,
) -> None:
    tensors = {"tokens": tokens, "weight": weight, "lora_A": lora_A, "lora_B": lora_B}
    check_not_sharded_alone(tokens, lora_A=lora_A, lora_B=lora_B)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a tensor")
        if not has_rows(tensor):
            raise ValueError(f"{name} is {describe_layout(tensor)}, expected a strided tensor")
        if name == "tokens":
            if tensor.dtype not in _INTEGERS:
                raise TypeError(f"tokens is {tensor.dtype}, expected integers")
        else:
            check_float(name, tensor)
    check_matrix("weight", weight, "num_embeddings", "embedding_dim")
    V, N = weight.shape
    check_matrix("lora_A", lora_A, "r", V)
    r = lora_A.shape[0]
    if r == 0:
        raise ValueError(f"lora_A has shape [0, {V}]: the rank r is 0, expected at least 1")
    check_matrix("lora_B", lora_B, N, r)
    check_same_dtype("lora_B", lora_B, "lora_A", lora_A.dtype)
    for name, tensor in tensors.items():
        check_device(name, tensor, weight.device, "weight")
    if isinstance(scaling, Tensor):
        if scaling.dim() > 0:
            raise ValueError(
                f"scaling has shape {list(scaling.shape)}, expected a number or a tensor of shape []"
            )
        if scaling.device.type != "cpu" and scaling.device != weight.device:
            raise ValueError(
                f"scaling is on {scaling.device}, expected {weight.device}, where weight is, or the CPU"
            )
    elif isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling is a {type(scaling).__name__}, expected a number")
    if padding_idx is None:
        return
    if isinstance(padding_idx, bool) or not isinstance(padding_idx, int):
        raise TypeError(f"padding_idx is a {type(padding_idx).__name__}, expected an int or None")
    if not -V <= padding_idx < V:
        raise ValueError(f"padding_idx is {padding_idx}, expected one of the {V} rows of weight")
