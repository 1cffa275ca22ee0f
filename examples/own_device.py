"""Where a process that torchrun has started computes."""

from __future__ import annotations

import os

import torch


def own_device() -> torch.device:
    """A GPU of its own, if this machine has one for each of its processes; else the CPU."""
    enough = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not (torch.cuda.is_available() and enough):
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
