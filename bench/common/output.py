"""Where results go: a file, replaced as a whole, or what is no file (a pipe, a device), written to."""

import os
import stat
import sys
from pathlib import Path
from typing import TextIO

from lorafast.core.files import write_whole

_ERRORS = "backslashreplace"
"""Half a character, as the name of a file may hold, becomes an escape that JSON has too."""


class UnwritableError(RuntimeError):
    """Results can't be kept where they were asked for; the message says why."""


def is_stream(path: Path) -> bool:
    """Whether ``path`` is there and no file of its own: it takes what is written, and only once."""
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False
    return not regular or _own_stream(path) is not None


def check(path: Path) -> None:
    """Makes the folder of ``path``.

    Raises:
        UnwritableError: nothing can be written to ``path``.
    """
    try:
        reason = None
        if path.is_dir():
            reason = "it is a folder"
        elif path.is_socket():
            reason = "it is a socket"
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(path if path.exists() else path.parent, os.W_OK):
                reason = "no permission"
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from None
    if reason is not None:
        raise UnwritableError(f"{path} can't be written: {reason}")


def write(path: Path, text: str) -> None:
    """Replaces a file, of which a reader sees the old or the new one; writes to what is none.

    Raises:
        UnwritableError: that failed.
    """
    try:
        own = _own_stream(path)
        if own is not None:
            own.write(text)
            own.flush()
        elif is_stream(path):
            with path.open("w", encoding="utf-8", errors=_ERRORS) as stream:
                stream.write(text)
        else:
            write_whole(path, text.encode(errors=_ERRORS))
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from None


def _own_stream(path: Path) -> TextIO | None:
    """stdout or stderr, if that is what ``path`` names, as ``/dev/stdout`` does."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if os.path.samestat(path.stat(), os.fstat(stream.fileno())):
                return stream
        except (OSError, ValueError):  # not there, or a stream without a descriptor
            continue
    return None


def _unwritable(path: Path, error: Exception) -> UnwritableError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return UnwritableError(f"{path} can't be written: {reason}")
