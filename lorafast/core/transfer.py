"""Numbers of the host's, brought to a device that nobody waits for."""

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values`` as a tensor on ``device``."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    # A copy from memory that isn't pinned would wait for all that the device has to do.
    pinned = torch.tensor(values, dtype=dtype, pin_memory=True)
    return pinned.to(device, non_blocking=True)
