"""What must be the same on every rank: replicated parameters, and the generators of masks."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce, broadcast
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from lorafast.nn.adapter_module import adapters_in


def check_replicas(model: nn.Module) -> None:
    """Compares, bit by bit, what ``model`` has replicated with the first rank's, and the generators.

    Every rank must call it; it sends the replicated parameters once.

    Raises:
        ValueError: they differ; the message names the first that does. Every rank of the mesh raises, or
            none does.
    """
    differing: dict[DeviceMesh, list[str]] = {}
    for name, part, mesh in _replicated(model):
        found = differing.setdefault(mesh, [])
        if not torch.equal(of_first(part, mesh).view(torch.uint8), part.view(torch.uint8)):
            found.append(name)
    cut = {layer._local.mesh: None for layer in adapters_in(model).values() if layer._local}
    for mesh in cut:
        if not torch.equal(of_first(state(mesh), mesh), state(mesh)):
            differing.setdefault(mesh, []).append("the generator of dropout's masks")
    for mesh, names in differing.items():
        wrong = torch.tensor(float(bool(names)), device=_device(mesh))
        all_reduce(wrong, group=mesh.get_group())
        if wrong:
            what = names[0] if names else "something"
            raise ValueError(
                f"{what} differs between ranks ({int(wrong)} of {mesh.size()} have other values than "
                "the first)"
            )


def _replicated(model: nn.Module) -> Iterator[tuple[str, Tensor, DeviceMesh]]:
    for name, parameter in model.named_parameters():
        whole: Any = parameter
        if not isinstance(whole, DTensor):
            continue
        mesh, part = whole.device_mesh, whole._local_tensor.detach().reshape(-1).contiguous()
        for i, placement in enumerate(whole.placements):
            if placement == Replicate():
                yield name, part, mesh[_names(mesh)[i]] if mesh.ndim > 1 else mesh


def _names(mesh: DeviceMesh) -> tuple[str, ...]:
    if mesh.mesh_dim_names is None:
        raise ValueError(f"{mesh} has no names for its dimensions: give it mesh_dim_names")
    return mesh.mesh_dim_names


def of_first(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """The first rank's, of a tensor that all have in the same shape."""
    group = mesh.get_group()
    sent = tensor.to(_device(mesh), copy=True)
    broadcast(sent, group=group, group_src=0)
    return sent.to(tensor.device)


def differs(tensor: Tensor, mesh: DeviceMesh) -> bool | None:
    """Whether any rank has another tensor than the first; None of zeros, and of what isn't finite.

    To half the digits of its dtype: not every kernel adds in one order. Every rank gets one answer.
    """
    own = tensor.detach()
    own = own.to(torch.promote_types(own.dtype, torch.float32))
    first = of_first(own, mesh)
    if type(first) is not Tensor:  # a fake one, which has no values
        return False
    norm = torch.linalg.vector_norm
    largest = torch.maximum(norm(own), norm(first))
    is_another = norm(own - first) > torch.finfo(tensor.dtype).eps ** 0.5 * largest
    is_seen = (largest > 0) & largest.isfinite()
    found = torch.stack([is_another, is_seen]).to(_device(mesh), torch.float32)
    all_reduce(found, ReduceOp.MAX, group=mesh.get_group())
    another, seen = found.bool().tolist()
    return another if seen else None


def state(mesh: DeviceMesh) -> Tensor:
    """Of the default generator of the mesh's device, bytes."""
    if mesh.device_type == "cpu":
        return torch.get_rng_state()
    found: Tensor = torch.get_device_module(mesh.device_type).get_rng_state()
    return found


def set_alike(mesh: DeviceMesh) -> None:
    """Gives the default generators of all ranks the state of the first's."""
    found = of_first(state(mesh), mesh)
    if type(found) is not Tensor:  # a fake one, which has no values
        return
    if mesh.device_type == "cpu":
        torch.set_rng_state(found)
    else:
        torch.get_device_module(mesh.device_type).set_rng_state(found)


def _device(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    index = torch.get_device_module(mesh.device_type).current_device()
    return torch.device(mesh.device_type, index)
