"""What becomes of a command's output where nobody reads it, the disk is full, or there is only ASCII."""

import codecs
import contextlib
import io
import os
import sys
import unicodedata
from typing import TextIO

BROKEN_PIPE = 141
"""The status that a shell reports for a program which the closed end of a pipe has ended."""
INTERRUPTED = 130
_ERRORS = "lorafast.readable"
_READABLE = {"µ": "u", "–": "-", "×": "x", "·": "*", "→": "->", "≤": "<=", "≥": ">="}


def prepare() -> None:
    """Output is never refused: where the encoding lacks a character it gets a readable one; where there
    is no stream, nothing is written."""
    codecs.register_error(_ERRORS, _readable)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors in (
            "strict",
            "surrogateescape",
        ):
            stream.reconfigure(errors=_ERRORS)


def _readable(error: UnicodeError) -> tuple[str | bytes, int]:
    """The first character that can't be written, in ASCII; bytes of a file's name as they are."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":
        return bytes([ord(character) - 0xDC00]), error.start + 1
    plain = _READABLE.get(character) or unicodedata.normalize("NFKD", character)
    return plain.encode("ascii", "ignore").decode() or "?", error.start + 1


def complain(command: str, reason: object) -> None:
    """``command: reason`` in one line on stderr, if there is somebody who reads it."""
    try:
        print(f"{command}: {reason}", file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """What ``stream`` still holds can't be written: when Python ends it must not be tried again."""
    with contextlib.suppress(OSError):  # a stream without a descriptor, as tests have
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)
