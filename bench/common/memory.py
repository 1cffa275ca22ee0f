"""Memory of a call: what it saves for backward, and its peak."""

import os
from collections.abc import Callable, Iterable
from itertools import accumulate

import torch
from torch import Tensor

from lorafast.backends import workspace


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that ``forward`` keeps for its backward, each storage once, parameters not counted.

    What an autograd function keeps in its context without ``save_for_backward``, as bitsandbytes'
    int8 product does with x, isn't seen.
    """
    kept: dict[int, tuple[int, Tensor]] = {}
    ours = {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            # The tensor is held, so that no later one can come to the same address.
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    del y
    return sum(size for size, _ in kept.values())


def whole(device: torch.device) -> int:
    """All memory that a device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that PyTorch's allocator held during ``call``, over what it held before; memory
    that layers share is given back first, so that it counts."""
    workspace.release()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is chatty
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        call()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    peak: int = max(accumulate((event.nbytes() for event in events), initial=0))
    return peak
