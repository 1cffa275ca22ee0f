"""Memory that outlives the call which asks for it, on any device."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def lasting(make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """What ``make`` makes on ``device``, in its default memory pool, ready for every stream.

    On a GPU another thread calls it. Allocations of this thread may go to a pool that is freed later:
    that of a graph, of compiled code that warms up, or of ``torch.cuda.use_mem_pool``.
    """
    if device.type != "cuda":
        with torch.inference_mode(False):  # else no call outside of that mode could write it
            return make()

    def elsewhere() -> Tensor:
        with torch.cuda.device(device):
            made = make()
            torch.cuda.current_stream(device).synchronize()
        return made

    with ThreadPoolExecutor(1, "lorafast memory") as thread:
        return thread.submit(elsewhere).result()
