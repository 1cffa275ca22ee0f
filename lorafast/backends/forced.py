"""Which backend the user has forced, by ``use_backend`` or ``LORAFAST_BACKEND``."""

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from lorafast.backends import registry
from lorafast.backends.registry import AUTO
from lorafast.core.errors import BackendError

ENVIRONMENT_VARIABLE = "LORAFAST_BACKEND"


def _known(name: str, origin: str) -> str | None:
    """The backend that ``name`` forces, None for ``auto``."""
    if name == AUTO:
        return None
    if name not in registry.names():
        expected = ", ".join((AUTO, *registry.names()))
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


def check_plain_pytorch(operation: str, reason: str) -> None:
    """Raises ``BackendError`` if a backend is forced that isn't made of differentiable operations.

    ``reason``: what asks for such operations, ``context.needs_plain_pytorch``.
    """
    name = _from_environment() if _latest is None else forced()
    if name is not None and name not in registry.plain_pytorch_names():
        able = " and ".join(map(repr, registry.plain_pytorch_names()))
        raise BackendError(
            f"backend {name!r} can't serve {operation}: {reason} need operations that PyTorch "
            f"differentiates itself, which only {able} is made of"
        )
