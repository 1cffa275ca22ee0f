"""Writing a file as a whole."""

import errno
import os
import secrets
from pathlib import Path


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
