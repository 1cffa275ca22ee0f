"""A layer's own parameters where they are DTensors: new values, the same on any mesh."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorafast.ops.unstrided import is_sharded


def draw_(init: Callable[..., object], parameter: Tensor, **options: Any) -> None:
    """``init(parameter, **options)``; of a DTensor what that makes of the whole tensor.

    The first rank's numbers are everybody's, and all ranks of the mesh must call this. By itself
    PyTorch draws each shard on a CPU: ranks of one seed would have the same rows.
    """
    if not is_sharded(parameter) or parameter.is_meta:
        init(parameter, **options)
        return
    from torch.distributed.tensor import Replicate, distribute_tensor

    sharded: Any = parameter
    mesh = sharded.device_mesh
    with torch.no_grad():
        whole = torch.empty(sharded.shape, dtype=sharded.dtype, device=mesh.device_type)
        init(whole, **options)
        everywhere = distribute_tensor(whole, mesh, [Replicate()] * mesh.ndim)
        sharded.to_local().copy_(everywhere.redistribute(mesh, sharded.placements).to_local())


def placed_as(tensor: Tensor, target: Tensor) -> Tensor:
    """``tensor``, sharded as ``target`` is if both are DTensors."""
    if not (is_sharded(tensor) and is_sharded(target)):
        return tensor
    sharded: Any = tensor
    wanted: Any = target
    placed: Tensor = sharded.redistribute(wanted.device_mesh, wanted.placements)
    return placed


def beside(tensor: Tensor, target: Tensor) -> Tensor:
    """``tensor`` where ``target`` is: whole if that is no DTensor, and on its mesh if it is one."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    wanted: Any = target
    if is_sharded(target) and sharded.device_mesh == wanted.device_mesh:
        return tensor
    whole: Tensor = sharded.full_tensor()
    if not is_sharded(target):
        return whole
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = wanted.device_mesh
    return distribute_tensor(whole, mesh, [Replicate()] * mesh.ndim, src_data_rank=None)
