"""How many SMs launches are planned for: all but those that PyTorch is asked to leave free."""

import torch


def carveout() -> int:
    """SMs of a device that matmuls leave to other kernels, as
    ``torch._C._set_sm_carveout_experimental`` says; 0 where PyTorch has no such thing.

    It is read in every call on a GPU, in some 50 ns, since it may change between two.
    """
    try:
        return torch._C._get_sm_carveout_experimental() or 0
    except AttributeError:  # it is experimental, and may go
        return 0


def planned_for(sms: int) -> int:
    """The SMs of a device that has ``sms`` of them, at least one."""
    return max(sms - carveout(), 1)
