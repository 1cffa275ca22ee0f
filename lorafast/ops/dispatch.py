"""Which backend serves a call: the one place that decides, and that says why not.

``auto`` takes the fastest backend that is measured to be so. On a CPU that is the native kernels
for whatever has a dropout mask, in bfloat16 (for ranks up to 32, the expansion for any), and in float32
over many rows; else it is ``aten``. On a GPU it is what ``lorafast tune`` found there, and where
there is no record near the call, what the model of ``roofline`` gives the least time.

A forced backend (``use_backend`` or ``LORAFAST_BACKEND``) that can't serve a call raises with the
reason; nothing falls back in silence.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafast.core.errors import BackendError
from lorafast.ops import backend as _backend
from lorafast.ops import native, on_gpu

AUTO = "auto"
ENVIRONMENT_VARIABLE = "LORAFAST_BACKEND"

OPERATIONS = ("shrink", "linear_expand", "expand_backward", "shrink_backward")

_ATEN_FUNCTIONS = {operation: _backend.ATEN.implementation(operation) for operation in OPERATIONS}


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


_UNREAD = object()
_environment: Any = _UNREAD


def _from_environment() -> str | None:
    """What ``LORAFAST_BACKEND`` forces; read late, for a wrong value must not stop imports."""
    global _environment
    if _environment is _UNREAD:
        _environment = _known(os.environ.get(ENVIRONMENT_VARIABLE) or AUTO, ENVIRONMENT_VARIABLE)
    return _environment


_blocks: dict[object, str | None] = {}
"""The choices of all ``use_backend`` blocks that are open in the process, the latest last."""
_latest: str | None = None
"""The name that the latest of them was given: compiled code is compiled again when it changes."""
_entered: ContextVar[tuple[object, ...]] = ContextVar("lorafast_blocks", default=())
"""The blocks that this thread or task is in; one that began inside a block may outlive it."""


def backend_names() -> tuple[str, ...]:
    """The names that ``use_backend`` takes, but ``auto``."""
    return tuple(_backend.BACKENDS)


def forced() -> str | None:
    """The name of the forced backend, None for ``auto``.

    Raises:
        ValueError: ``LORAFAST_BACKEND`` is the name of none.
    """
    if _blocks:
        for block in reversed(_entered.get()):
            with contextlib.suppress(KeyError):  # it has ended
                return _blocks[block]
        latest = list(_blocks.values())[-1:]  # other threads open and close blocks meanwhile
        if latest:
            return latest[0]
    return _from_environment() if _environment is _UNREAD else _environment


# torch.compiler.assume_constant_result, without the second that importing the compiler takes: Dynamo
# can't trace a ContextVar. ``_latest`` is what it guards; compiled operations ask whenever they run.
forced._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, every operation runs on backend ``name`` (``auto`` to lift a choice).

    The choice is that of the thread or async task that opens the block. A thread that has opened none
    (autograd's, those of ``nn.DataParallel``) follows the latest block that is open anywhere in the
    process. A backward runs on the backend of its forward, also when it runs after the block; compiled
    code asks anew whenever it runs an operation.

    Raises:
        ValueError: there is no backend of this name.
        BackendError: (from the operations inside) the backend can't serve the call.
    """
    chosen, block, outer = _known(name, "name"), object(), _entered.get()
    global _latest
    _blocks[block] = chosen
    _entered.set((*outer, block))
    _latest = name
    try:
        yield
    finally:
        del _blocks[block]
        _entered.set(outer)
        remaining = list(_blocks.values())[-1:]
        _latest = (remaining[0] or AUTO) if remaining else None


def why_not(name: str, operation: str, tensors: tuple[Tensor | None, ...]) -> str | None:
    """The reason for which backend ``name`` can't serve this call, or None if it can."""
    backend = _backend.BACKENDS[name]
    return backend.why_unusable() or backend.why_refused(
        operation, tuple([t for t in tensors if t is not None])
    )


def check_plain_pytorch(operation: str, reason: str) -> None:
    """Raises ``BackendError`` if a backend is forced that isn't made of PyTorch's own operations.

    ``reason``: what asks for such operations, ``context.needs_plain_pytorch``.
    """
    name = _from_environment() if _latest is None else forced()
    if name not in (None, _backend.REFERENCE.name):
        raise BackendError(
            f"backend {name!r} can't serve {operation}: {reason} need operations that PyTorch "
            f"differentiates itself, which only {_backend.REFERENCE.name!r} is made of"
        )


def select(operation: str, name: str | None, *tensors: Tensor | None) -> Callable[..., Any]:
    """The function that runs ``operation`` on backend ``name`` (None: the automatic choice).

    Raises:
        BackendError: the named backend can't serve these tensors.
    """
    if name is None:
        name = automatic_choice(operation, *tensors)[0]
        if name is _ATEN:
            return _ATEN_FUNCTIONS[operation]
        return _backend.BACKENDS[name].implementation(operation)
    reason = why_not(name, operation, tensors)
    if reason is not None:
        raise BackendError(f"backend {name!r} can't serve {operation}: {reason}")
    return _backend.BACKENDS[name].implementation(operation)


def select_whole(
    whole: str,
    name: str | None,
    x: Tensor,
    lora_A: Tensor,
    seed: Tensor | None,
    *others: Tensor | None,
) -> Callable[..., Any] | None:
    """The function ``whole`` of backend ``name``, which does all operations of a layer's forward or
    backward in one call; None if it has none, or for ``auto`` if other backends are faster.

    Raises:
        BackendError: the named backend can't serve these tensors.
    """
    if name is None:
        name = automatic_whole(whole, x, lora_A, seed, *others)[0]
        return None if name is None else _backend.BACKENDS[name].implementation(whole)
    if name not in (_CPU, _TRITON):
        return None
    reason = why_not(name, whole, (x, lora_A, seed, *others))
    if reason is not None:
        raise BackendError(f"backend {name!r} can't serve {whole}: {reason}")
    return _backend.BACKENDS[name].implementation(whole)


def automatic_whole(
    whole: str, x: Tensor, lora_A: Tensor, seed: Tensor | None, *others: Tensor | None
) -> tuple[str | None, str]:
    """The backend that ``auto`` takes for a whole layer's forward or backward, and the rule for it.

    None where its operations choose one by one. On a CPU what is the fastest for ``shrink`` is so for
    the whole: the base product has left Python and the dispatcher cold, and each call more costs
    more than what another backend would gain.
    """
    if x.is_cuda:
        if why_not(_TRITON, whole, (x, lora_A, seed, *others)) is not None:
            return None, ""
        return on_gpu.whole(whole, x, lora_A, seed, *others)
    backend, reason = automatic_choice("shrink", x, lora_A, seed)
    if backend is _CPU and why_not(_CPU, whole, others) is None:
        return backend, reason
    return None, ""


# Where the rank is found among an operation's tensors: (which tensor, which dimension).
_RANK = {"shrink": (1, 0), "expand_backward": (1, 1), "shrink_backward": (0, 1)}
THIN = 32
"""The rank up to which, in bfloat16, the native reductions beat the vendor's: measured at 4 to 128."""
MANY = 128
"""The rows from which, in float32, the native kernels do: measured at 1 to 1024."""

_CPU, _ATEN, _TRITON = _backend.CPU.name, _backend.ATEN.name, _backend.TRITON.name
_UNMEASURED = (_ATEN, "no measurement on this device shows another backend ahead of it")
_REFUSED = (_ATEN, "the fastest that can serve it")
_MASK = (_CPU, "on a CPU with dropout, measured")
_BFLOAT16 = (_CPU, "on a CPU in bfloat16, measured")
_BFLOAT16_THIN = (_CPU, f"on a CPU in bfloat16 up to rank {THIN}, measured")
_FLOAT32 = (_CPU, f"on a CPU in float32 from {MANY} rows, measured")
_ELSE = (_ATEN, "on a CPU without dropout, measured")


def automatic_choice(operation: str, *tensors: Tensor | None) -> tuple[str, str]:
    """The backend that ``auto`` takes for an operation on its tensors, and the rule for it.

    The rules for a CPU were measured on one with AVX-512 and its bfloat16 product.
    """
    x = tensors[0]
    if x is not None and x.is_cuda:
        reason = why_not(_TRITON, operation, tensors)
        if reason is not None:
            return _ATEN, f"the only one that can serve it: {reason}"
        return on_gpu.choice(operation, *tensors)
    if x is None or not x.is_cpu:
        return _UNMEASURED
    if why_not(_CPU, operation, tensors) is not None:
        return _REFUSED
    for tensor in tensors:
        if tensor is not None and tensor.dtype is torch.int64:  # the seed of a mask
            return _MASK
    if x.dtype is torch.bfloat16 and native.multiplies_bfloat16():
        if operation == "linear_expand":
            return _BFLOAT16
        which, dimension = _RANK[operation]
        like = tensors[which]
        if like is not None and like.shape[dimension] <= THIN:
            return _BFLOAT16_THIN
    elif x.dtype is torch.float32 and x.shape[0] >= MANY and native.has_avx512():
        return _FLOAT32
    return _ELSE


def backends() -> dict[str, BackendStatus]:
    """Every backend by name: whether this machine can use it, and if not, why."""
    status = {}
    for name, backend in _backend.BACKENDS.items():
        reason = backend.why_unusable()
        status[name] = BackendStatus(name, reason is None, reason)
    return status
