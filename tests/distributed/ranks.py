"""Several ranks on one machine: a function that every process of a gloo group calls.

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

IMPORTED_ONCE = [
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
    "torch.distributed.tensor.parallel",
    "lorafast",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(IMPORTED_ONCE)


@functools.cache
def _server(imports: tuple[str, ...]) -> forkserver.ForkServer:
    server = forkserver.ForkServer()
    server.set_forkserver_preload([*IMPORTED_ONCE, *imports])
    return server


@contextlib.contextmanager
def _forked_from(imports: tuple[str, ...]) -> Iterator[None]:
    """Processes that start in here are those of the server that has imported these too."""
    before = forkserver.connect_to_new_process
    if imports:
        forkserver.connect_to_new_process = _server(imports).connect_to_new_process
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
) -> list[Any]:
    """``function(rank, *arguments)`` on every rank of a group of ``world``; what each returned, by rank.

    ``function`` is one of a module; what it takes and returns can be pickled (tensors travel as NumPy
    arrays, or in lists and dictionaries: ``.numpy()``). ``imports``: modules that take long to import.

    Raises:
        RankError: a rank raised, died, or wasn't done after ``seconds``.
    """
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = os.path.join(folder, "rendezvous")
        processes, ends = [], []
        for rank in range(world):
            here, there = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_run, args=(there, rank, world, rendezvous, seconds, function, arguments)
            )
            with _forked_from(imports):
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
    rank: int,
    world: int,
    rendezvous: str,
    seconds: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=seconds),
        )
        end.send((True, function(rank, *arguments)))
        dist.barrier()  # nobody leaves while another still sends
    except BaseException:
        end.send((False, traceback.format_exc()))
    os._exit(0)  # gloo's threads may abort a process that ends by itself
