"""What surrounds a call: autocast, transforms, tracing, and modes that see every operation.

They are asked in every call, so each is one look at a flag of PyTorch's, most of them private. Those
looked up by ``getattr`` may go: their question is then answered as if nothing surrounded the call.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

# Ten times as cheap as asking for the device of a tensor; without it every call asks.
autocast_anywhere: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)

transforms_active: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: False
)
traced: Callable[[], bool] = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)
# Of a gradient in the backward: is_grads_batched, which no kernel knows.
is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
function_modes: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", lambda: 0)


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``; meta has none and can't be asked."""
    return (
        autocast_anywhere()
        and isinstance(x, Tensor)
        and not x.is_meta
        and torch.is_autocast_enabled(x.device.type)
    )


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Inside an operation dtypes are settled: autocast must not change them again."""
    if autocast_enabled(x):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def needs_plain_pytorch(compiling: bool = False) -> str | None:
    """What asks for operations that PyTorch differentiates, batches or exports itself, or None.

    Neither an ``autograd.Function`` nor a registered operation has a tangent or a batching rule here,
    and an exported program must run where this package isn't installed.
    """
    if transforms_active():
        return "torch.func transforms"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives"
    if torch.compiler.is_exporting() if compiling else traced():
        return "exported programs"
    return None


def alone() -> bool:
    """Whether nothing surrounds an eager call of which the two questions here ask, in one look."""
    return not (
        transforms_active()
        or forward_ad._current_level >= 0
        or traced()
        or dispatch_modes()
        or function_modes()
    )


def watched() -> bool:
    """Whether a mode sees every operation of PyTorch's and may keep what it returns.

    Selective activation checkpointing does so: what it has kept must not be changed in place after. A
    registered operation is one call to a mode, which sees no part of it.
    """
    if dispatch_modes():
        return True
    count = function_modes()
    # A default device is a mode too, and keeps nothing.
    return count > 0 and any(
        type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(count)
    )
