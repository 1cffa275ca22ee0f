"""Layers as PyTorch's own calls of ``F.linear``, for inputs whose rows the kernels can't read.

Sparse, nested and oneDNN tensors, and DTensors with dropout: whatever ``F.linear`` does with them, this
does. DTensors without go through the registered operation. In the low-rank term float16 is float32, as
in every backend.
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafast import operands
from lorafast.backends import forced
from lorafast.backends.dropout import keep_mask
from lorafast.core.convolution import Geometry, convolve
from lorafast.core.dtypes import wide
from lorafast.operands import Weight
from lorafast.ops.checks import describe_layout
from lorafast.ops.sharding import tell_dtensor
from lorafast.reference.dropout import survivor_scale


def lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """``y = x·Wᵀ + scaling · (drop(x)·Aᵀ)·Bᵀ + bias`` on checked arguments, outside autocast.

    The mask of a nested tensor is PyTorch's own; that of a DTensor is the one that the whole tensor
    would have on one device, drawn by the first rank of its mesh.

    Raises:
        ValueError: dropout of a sparse or oneDNN ``x``, which PyTorch doesn't have.
        BackendError: a backend is forced that isn't made of PyTorch's own operations.
    """
    if not dropout_p and is_sharded(x):
        tell_dtensor()
        y: Tensor = torch.ops.lorafast.lora_linear(
            x, operands.stored(weight), operands.describe(weight), lora_A, lora_B, scaling, bias
        )[0]
        return y
    kind = type(x).__name__ if is_sharded(x) else describe_layout(x)
    forced.check_plain_pytorch("lora_linear", f"inputs like this one ({kind})")
    dropped = _drop(x, dropout_p, seed) if dropout_p else x
    dtype = wide(x.dtype)
    s = F.linear(dropped.to(dtype), lora_A.to(dtype))
    return (
        F.linear(operands.activations(x, weight), operands.as_dense(weight), bias)
        + F.linear(s, lora_B.to(dtype) * scaling)
    ).to(x.dtype)


def lora_conv(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    geometry: Geometry,
    dropout_p: float,
    seed: Tensor,
) -> Tensor:
    """``y = conv(x, W) + scaling · conv(conv(drop(x), A), B) + bias`` of a DTensor with dropout."""
    left = drop_sharded(x.movedim(1, -1), dropout_p, seed).movedim(-1, 1)
    s = convolve(left, lora_A.to(left.dtype), None, geometry.of_A())
    n = len(geometry.stride)
    pointwise = Geometry((1,) * n, (0,) * n, (1,) * n, geometry.groups)
    low_rank = convolve(s, lora_B.to(left.dtype) * scaling, None, pointwise)
    return (convolve(x, weight, bias, geometry) + low_rank).to(x.dtype)


def _drop(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    if seed is not None and is_sharded(x):
        return drop_sharded(x, dropout_p, seed)
    x = x.to(wide(x.dtype))
    if not x.is_nested:
        raise ValueError(
            f"x is {describe_layout(x)}, of which PyTorch has no dropout: expected a strided tensor "
            "(x.to_dense()) or dropout_p 0"
        )
    return F.dropout(x, dropout_p)


def drop_sharded(x: Any, dropout_p: float, seed: Tensor) -> Tensor:
    """``drop(x)`` of a DTensor, in the dtype of the low-rank term."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    mesh = x.device_mesh
    everywhere = [Replicate()] * mesh.ndim
    seed = distribute_tensor(seed, mesh, everywhere).to_local()  # the first rank's, on all of them
    K = x.shape[-1]
    keep = keep_mask(x.numel() // max(K, 1), K, dropout_p, seed).view(x.shape)
    kept = DTensor.from_local(keep, mesh, everywhere, run_check=False)
    return torch.where(kept, x.to(wide(x.dtype)), 0.0) * survivor_scale(dropout_p)


def is_sharded(x: Tensor) -> bool:
    """Whether ``x`` is a DTensor."""
    if type(x) is Tensor:
        return False
    tensors: Any = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(x, tensors.DTensor)
