"""An adapter's two files, written and read as one.

Two files can't be exchanged at once. So the weights carry a digest of the config that they were saved
with: whoever reads knows whether both are of one save. Both are complete on the disk before either
takes its name, the weights first: an interrupted save then leaves new weights, whose digest refuses
the old config.
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from torch import Tensor

from lorafast.convert.peft_format import CONFIG_FILE, WEIGHTS_FILE, config_digest
from lorafast.core.files import locked

_DIGEST = "lorafast_config_digest"
_DRAFT = ".lorafast-save-"
# A draft that nobody has written to for so long is what a killed process left behind.
_ABANDONED_S = 3600.0
# When to look again at files of two saves: between its two renames a writer needs microseconds.
_LOOKS_S = (0.0, 0.01, 0.05, 0.1, 0.2)
_REWRITES = 20

_T = TypeVar("_T")


def safetensors() -> ModuleType:
    """``safetensors.torch``.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "adapters are saved and loaded with safetensors: pip install safetensors"
        ) from error
    return safetensors.torch


def check_folder(folder: Path) -> None:
    """Raises ``OSError`` in a sentence where no adapter can be saved."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"{path} is a file, expected a folder to save the adapter in")
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        if (folder / file).is_dir():
            raise IsADirectoryError(
                f"{folder / file} is a folder: the adapter's file can't replace it"
            )


def write_pair(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes both files; on an error ``folder`` is as it was, and without one there is none.

    Processes may write to one folder at the same time: what stays is the pair of one of them.

    Raises:
        OSError: the folder or a file can't be written.
    """
    check_folder(folder)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    metadata = {"format": "pt", _DIGEST: config_digest(json.loads(text))}
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(_REWRITES):
            with _draft(folder) as draft:
                _save(tensors, draft / WEIGHTS_FILE, metadata)
                (draft / CONFIG_FILE).write_text(text, encoding="utf-8")
                # safetensors lets the owner alone read what it writes.
                (draft / WEIGHTS_FILE).chmod((draft / CONFIG_FILE).stat().st_mode & 0o777)
                for file in (WEIGHTS_FILE, CONFIG_FILE):
                    _sync(draft / file)
                with locked(folder):
                    _take_names(draft, folder)
                    _sync(folder)
                    if _is_one_save(folder):
                        return
        raise OSError(f"{folder} is written to by others again and again: the adapter isn't saved")
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):  # it isn't there, or another process uses it
                path.rmdir()
        raise


def read_pair(folder: Path, parse: Callable[[object, Path], _T]) -> tuple[_T, dict[str, Tensor]]:
    """The config, parsed, and the tensors, both of one save.

    Raises:
        FileNotFoundError: a file is missing; the message says what there is.
        NotADirectoryError: ``folder`` is a file.
        ValueError: a file can't be read, or they are of two saves.
    """
    for wait in _LOOKS_S:
        time.sleep(wait)
        # The first look doesn't ask for the lock, which another process may hold for long.
        with locked(folder) if wait else contextlib.nullcontext():
            raw = _read_json(folder)
            config = parse(raw, folder / CONFIG_FILE)
            assert isinstance(raw, dict)
            tensors = _read_tensors(folder, config_digest(raw))
        if tensors is not None:
            return config, tensors
    raise ValueError(
        f"{CONFIG_FILE} and {WEIGHTS_FILE} in {folder} are not of one save (one was interrupted, or "
        "the config was edited): save the adapter again"
    )


@contextlib.contextmanager
def _draft(folder: Path) -> Iterator[Path]:
    """A folder of our own inside ``folder``, which nobody else can know the name of or write to."""
    draft = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=folder))
    try:
        # By the file system's own clock.
        _remove_abandoned(folder, draft.stat().st_mtime - _ABANDONED_S)
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _take_names(draft: Path, folder: Path) -> None:
    weights, kept = folder / WEIGHTS_FILE, draft / "replaced"
    replaces = os.path.lexists(weights)
    with contextlib.suppress(OSError):  # there is none, or the file system has no links
        os.link(weights, kept)
    os.replace(draft / WEIGHTS_FILE, weights)
    try:
        os.replace(draft / CONFIG_FILE, folder / CONFIG_FILE)
    except BaseException:
        if kept.exists():
            os.replace(kept, weights)
        elif not replaces:
            weights.unlink()
        raise


def _remove_abandoned(folder: Path, before: float) -> None:
    with os.scandir(folder) as entries:
        drafts = [entry for entry in entries if entry.name.startswith(_DRAFT)]
    for entry in drafts:
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if not entry.is_dir(follow_symlinks=False):
                continue
            inside = [one.stat(follow_symlinks=False) for one in os.scandir(entry.path)]
            touched = max(stat.st_mtime for stat in (entry.stat(follow_symlinks=False), *inside))
            if touched < before:
                shutil.rmtree(entry.path)


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems can't do that for a folder.
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError

    try:
        safetensors().save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path.parent.parent / path.name} can't be written: {error}") from error


def _is_one_save(folder: Path) -> bool:
    """Whether both files are of one save, soon: without a lock another writer may be between them."""
    for wait in _LOOKS_S:
        time.sleep(wait)
        raw = _read_json(folder)
        if isinstance(raw, dict):
            with _opened(folder) as file:
                if _digest_of(file) in (None, config_digest(raw)):
                    return True
    return False


def _read_json(folder: Path) -> object:
    path = folder / CONFIG_FILE
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a file")
    if not path.is_file():
        raise _missing(folder, CONFIG_FILE)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is not JSON that can be read: it is nested too deeply") from error
    except ValueError as error:  # also an integer of more digits than Python reads
        raise ValueError(f"{path} is not JSON: {error}") from error


def _read_tensors(folder: Path, digest: str) -> dict[str, Tensor] | None:
    """The tensors, or None if they are not of the config's save or were replaced meanwhile."""
    before = _identity(folder / WEIGHTS_FILE)
    with _opened(folder) as file:
        if _digest_of(file) not in (None, digest):
            return None
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    # safe_open opens the file twice, for the header and for the tensors: they may be of two saves.
    return tensors if _identity(folder / WEIGHTS_FILE) == before else None


def _identity(path: Path) -> tuple[int, ...] | None:
    if not path.exists():
        return None
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    """The safetensors file."""
    safetensors()
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS_FILE
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a file")
    if not path.is_file():
        raise _missing(folder, WEIGHTS_FILE)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _digest_of(file: Any) -> str | None:
    digest: str | None = (file.metadata() or {}).get(_DIGEST)
    return digest


def _missing(folder: Path, file: str) -> OSError:
    """What is there instead of an adapter's file."""
    if not folder.exists():
        return FileNotFoundError(f"{folder} doesn't exist, expected the folder of an adapter")
    if not folder.is_dir():
        return NotADirectoryError(f"{folder} is a file, expected the folder of an adapter")
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith(_DRAFT))
    pickles = [name for name in ("adapter_model.bin", "adapter_model.pt") if name in names]
    if pickles and file == WEIGHTS_FILE:
        return FileNotFoundError(
            f"{folder} has no {file}; {pickles[0]} is a pickle and is never read"
        )
    inside = [name for name in names if (folder / name / CONFIG_FILE).is_file()]
    if inside:
        return FileNotFoundError(
            f"{folder} has no {file}, but there is one in {_some(inside)} inside it"
        )
    return FileNotFoundError(f"{folder} has no {file}; it holds {_some(names) or 'nothing'}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
