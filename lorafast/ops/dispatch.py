"""Which backend serves a call: the one place that decides, and that says why not.

``auto`` takes the fastest backend that is measured to be so. On a CPU that is the native kernels
for whatever has a dropout mask, and in bfloat16 for ranks up to 16 over many rows; else it is ``aten``.
No record from a GPU exists yet. A forced backend (``use_backend`` or ``LORAFAST_BACKEND``) that can't
serve a call raises with the reason; nothing falls back in silence.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafast.ops import backend as _backend
from lorafast.ops import native

AUTO = "auto"
ENVIRONMENT_VARIABLE = "LORAFAST_BACKEND"

OPERATIONS = ("shrink", "linear_expand", "expand_backward", "shrink_backward")

_ATEN_FUNCTIONS = {operation: _backend.ATEN.implementation(operation) for operation in OPERATIONS}


class BackendError(RuntimeError):
    """A backend was forced that can't serve the call; the message says why."""


@dataclass(frozen=True)
class BackendStatus:
    """Whether this machine can use a backend, and if not, why."""

    name: str
    usable: bool
    reason: str | None

    def __str__(self) -> str:
        return f"{self.name}: {'usable' if self.usable else self.reason}"


def _known(name: str, origin: str) -> str | None:
    """The backend that ``name`` forces, None for ``auto``."""
    if name == AUTO:
        return None
    if name not in _backend.BACKENDS:
        expected = ", ".join((AUTO, *_backend.BACKENDS))
        raise ValueError(f"{origin} is {name!r}, expected one of {expected}")
    return name


_forced: str | None = _known(os.environ.get(ENVIRONMENT_VARIABLE) or AUTO, ENVIRONMENT_VARIABLE)


def backend_names() -> tuple[str, ...]:
    """The names that ``use_backend`` takes, but ``auto``."""
    return tuple(_backend.BACKENDS)


def forced() -> str | None:
    """The name of the forced backend, None for ``auto``."""
    return _forced


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, every operation runs on backend ``name`` (``auto`` to lift a choice).

    The choice holds for the whole process, as PyTorch's own ``torch.backends`` flags do. A backward
    runs on the backend of its forward, also when it runs after the block; compiled code asks anew
    whenever it runs an operation.

    Raises:
        ValueError: there is no backend of this name.
        BackendError: (from the operations inside) the backend can't serve the call.
    """
    global _forced
    before, _forced = _forced, _known(name, "name")
    try:
        yield
    finally:
        _forced = before


def why_not(name: str, operation: str, tensors: tuple[Tensor | None, ...]) -> str | None:
    """The reason for which backend ``name`` can't serve this call, or None if it can."""
    backend = _backend.BACKENDS[name]
    return backend.why_unusable() or backend.why_refused(
        operation, tuple(t for t in tensors if t is not None)
    )


def select(operation: str, name: str | None, *tensors: Tensor | None) -> Callable[..., Any]:
    """The function that runs ``operation`` on backend ``name`` (None: the automatic choice).

    Raises:
        BackendError: the named backend can't serve these tensors.
    """
    if name is None:
        if automatic_choice(operation, *tensors)[0] == _backend.CPU.name:
            return _backend.CPU.implementation(operation)
        return _ATEN_FUNCTIONS[operation]
    reason = why_not(name, operation, tensors)
    if reason is not None:
        raise BackendError(f"backend {name!r} can't serve {operation}: {reason}")
    return _backend.BACKENDS[name].implementation(operation)


# Where the rank is found among an operation's tensors: (which tensor, which dimension).
_RANK = {
    "shrink": (1, 0),
    "linear_expand": (2, 1),
    "expand_backward": (1, 1),
    "shrink_backward": (0, 1),
}
_THIN = 16
"""The rank up to which the native kernels beat the vendor's products, measured at 16, 32, 64 and 128."""
_MANY = 128
"""The rows from which they do, measured at 1, 8, 64 and 512: below, packing A and B counts more."""


def automatic_choice(operation: str, *tensors: Tensor | None) -> tuple[str, str]:
    """The backend that ``auto`` takes for an operation on its tensors, and the rule for it.

    The rules for a CPU were measured on one with AVX-512 and its bfloat16 product.
    """
    aten, cpu = _backend.ATEN.name, _backend.CPU.name
    x = tensors[0]
    if x is None or x.device.type != "cpu":
        return aten, "no measurement on this device shows another backend ahead of it"
    if why_not(cpu, operation, tensors) is not None:
        return aten, "the fastest that can serve it"
    if any(t is not None and t.dtype is torch.int64 for t in tensors):  # the seed of a mask
        return cpu, "on a CPU with dropout, measured"
    which, dimension = _RANK[operation]
    like = tensors[which]
    thin = like is not None and like.shape[dimension] <= _THIN and x.shape[0] >= _MANY
    if thin and x.dtype is torch.bfloat16 and native.multiplies_bfloat16():
        return cpu, f"on a CPU in bfloat16 up to rank {_THIN} from {_MANY} rows, measured"
    return aten, "on a CPU without dropout, measured"


def backends() -> dict[str, BackendStatus]:
    """Every backend by name: whether this machine can use it, and if not, why."""
    status = {}
    for name, backend in _backend.BACKENDS.items():
        reason = backend.why_unusable()
        status[name] = BackendStatus(name, reason is None, reason)
    return status
