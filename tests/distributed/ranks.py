"""Several ranks on one machine: a function that every process of a group calls.

Where there are as many GPUs the group is one of NCCL and each rank has a GPU of its own; else it is one
of gloo, on the CPU. ``device()`` says where a rank computes: models are made on the CPU, with the
numbers that one process has, and moved there.

The processes are forked from a server that has imported what every test needs, once for all tests of a
worker; ``imports`` names what else, of a server of its own. A rank that fails ends the others: a test
fails, it doesn't hang.
"""

import contextlib
import functools
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import wait
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._pytree import tree_map_only

IMPORTED_ONCE = [
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
    "torch.distributed.tensor.parallel",
    "lorafast",
    "lorafast.parallel",
    "numpy",
    "pytest",  # the function is one of a test's module
]
_context = multiprocessing.get_context("forkserver")
_device = torch.device("cpu")


def device() -> torch.device:
    """Where this process computes: a rank of a group of NCCL on its own GPU, all others on the CPU."""
    return _device


def mesh_of(*shape: int, **names: Any) -> DeviceMesh:
    """A mesh of the ranks' devices; by default one dimension, of all ranks."""
    return init_device_mesh(device().type, shape or (dist.get_world_size(),), **names)


def own_draws() -> contextlib.AbstractContextManager[None]:
    """What is drawn within it leaves the generators as they were."""
    return torch.random.fork_rng([device()] if device().type == "cuda" else [])


def chosen(rank: int, world: int, cpu_because: str = "") -> tuple[str, torch.device]:
    """The backend of a group of ``world`` ranks, and the device of this one."""
    if cpu_because or torch.cuda.device_count() < world:
        return "gloo", torch.device("cpu")
    return "nccl", torch.device("cuda", rank)


# What has begun CUDA can't be forked: is_available() begins it, but for the first of these.
_WITH_GPUS = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
# A rank that computes on the CPU sees no GPU: PyTorch's default meshes are of what it sees.
_WITHOUT = {"CUDA_VISIBLE_DEVICES": ""}


@functools.cache
def _server(imports: tuple[str, ...], device_type: str) -> forkserver.ForkServer:
    server = forkserver.ForkServer()
    server.set_forkserver_preload([*IMPORTED_ONCE, *imports])
    with mock.patch.dict(os.environ, _WITHOUT if device_type == "cpu" else _WITH_GPUS):
        server.ensure_running()
    return server


@contextlib.contextmanager
def forked_for(device_type: str, imports: tuple[str, ...] = ()) -> Iterator[None]:
    """Processes that start in here are those of the server that has imported these too."""
    before = forkserver.connect_to_new_process
    forkserver.connect_to_new_process = _server(imports, device_type).connect_to_new_process
    try:
        yield
    finally:
        forkserver.connect_to_new_process = before


class RankError(AssertionError):
    """What a rank raised, with its traceback, or how it ended."""


def on_ranks(
    function: Callable[..., Any],
    *arguments: Any,
    world: int = 2,
    seconds: float = 90.0,
    imports: tuple[str, ...] = (),
    cpu_because: str = "",
) -> list[Any]:
    """``function(rank, *arguments)`` on every rank of a group of ``world``; what each returned, by rank.

    ``function`` is one of a module; what it takes and returns can be pickled, and tensors in what it
    returns arrive as NumPy arrays. ``imports``: modules that take long to import. ``cpu_because``: the
    reason for which a test is about the CPU alone, whatever GPUs there are.

    Raises:
        RankError: a rank raised, died, or wasn't done after ``seconds``.
    """
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = os.path.join(folder, "rendezvous")
        processes, ends = [], []
        for rank in range(world):
            here, there = _context.Pipe(duplex=False)
            place = chosen(rank, world, cpu_because)
            group = (*place, rank, world, rendezvous, seconds)
            process = _context.Process(target=_run, args=(there, group, function, arguments))
            with forked_for(place[1].type, imports):
                process.start()
            there.close()
            processes.append(process)
            ends.append(here)
        try:
            return _gather(ends, time.monotonic() + seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _gather(ends: list[Any], deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(ends):
        left = [end for rank, end in enumerate(ends) if rank not in found]
        ready = wait(left, max(deadline - time.monotonic(), 0.0))
        if not ready:
            missing = [rank for rank in range(len(ends)) if rank not in found]
            raise RankError(f"ranks {missing} weren't done in time")
        for end in ready:
            rank = ends.index(end)
            try:
                good, found[rank] = end.recv()
            except EOFError:
                raise RankError(f"rank {rank} died") from None
            if not good:
                raise RankError(f"rank {rank} of {len(ends)}:\n{found[rank]}")
    return [found[rank] for rank in range(len(ends))]


def _run(
    end: Any,
    group: tuple[Any, ...],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    try:
        rank = _begin(*group)
        end.send((True, tree_map_only(Tensor, _array, function(rank, *arguments))))
        dist.barrier()  # nobody leaves while another still sends
    except BaseException:
        end.send((False, traceback.format_exc()))
    os._exit(0)  # gloo's threads may abort a process that ends by itself


def _begin(
    backend: str, place: torch.device, rank: int, world: int, rendezvous: str, seconds: float
) -> int:
    """Makes this process a rank of the group; its rank."""
    global _device
    _device = place
    on_gpu = place.type == "cuda"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if on_gpu:
        torch.cuda.set_device(place)
        # The tests' tolerances are those of float32.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group(
        backend,
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=seconds),
        device_id=place if on_gpu else None,
    )
    return rank


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()
