"""Writing a file as a whole, and a folder by one process at a time."""

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_PATIENCE_S = 10.0
"""How long to wait for another process that holds a folder's lock."""


def write_whole(path: Path, content: bytes) -> None:
    """Writes ``path``: a reader sees the old file or the new one, also where several write at once.

    A symbolic link stays one, and what it points to is written.

    Raises:
        OSError: it can't be written, or is no file (a folder, a pipe, a device); what was there is as it
            was.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    # Of this process, this thread and this call alone.
    draft = target.with_name(f".lorafast-{os.getpid()}-{secrets.token_hex(8)}")
    try:
        with draft.open("xb") as file:
            file.write(content)
        draft.replace(target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, where the file system has one and nobody holds it for too long."""
    if fcntl is None or not folder.is_dir():
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.002)
                    continue
            except OSError:  # a file system without locks: whoever writes looks at what came of it
                pass
            break
        yield
    finally:
        # Not by closing alone: a process forked meanwhile has the handle too.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)
