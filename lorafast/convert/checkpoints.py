"""The tensors of another model: a model's, a ``state_dict``'s or a checkpoint's, read one at a time."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorafast.convert.adapter_pair import safetensors
from lorafast.convert.peft_format import CONFIG_FILE

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Source = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]


class Tensors:
    """Tensors by key: their keys and shapes at once, the values where they are asked for."""

    def __init__(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.name = name
        """What it is called in messages."""
        self.shapes = dict(shapes)

    def read(self, key: str) -> Tensor:
        """The tensor of this key."""
        raise NotImplementedError


class _InMemory(Tensors):
    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(name, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
        self._tensors = tensors

    def read(self, key: str) -> Tensor:
        return self._tensors[key].detach()


class _InFiles(Tensors):
    def __init__(self, name: str, files: list[Any]) -> None:
        self._file_of = {key: file for file in files for key in file.keys()}  # noqa: SIM118
        super().__init__(
            name, {k: tuple(file.get_slice(k).get_shape()) for k, file in self._file_of.items()}
        )

    def read(self, key: str) -> Tensor:
        tensor: Tensor = self._file_of[key].get_tensor(key)
        return tensor


@contextlib.contextmanager
def opened(source: Source) -> Iterator[Tensors]:
    """The tensors of ``source``, for the time of the block.

    Raises:
        TypeError: it is none of these, or a ``state_dict`` holds anything but tensors.
        FileNotFoundError: there is no such file, or none in the folder. Pickles are never read.
        ValueError: a file can't be read.
        ImportError: safetensors is not installed.
    """
    if isinstance(source, nn.Module):
        yield _InMemory("the other model", state_of(source))
    elif isinstance(source, Mapping):
        for key, value in source.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{key} of the state dict is a {type(value).__name__}: no tensor")
        yield _InMemory("the state dict", source)
    elif isinstance(source, str | os.PathLike):
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(_open(path)) for path in _files(Path(source))]
            yield _InFiles(str(source), files)
    else:
        raise TypeError(
            f"other is a {type(source).__name__}, expected a model, a state dict or a checkpoint's path"
        )


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, a shared one under each of its names."""
    state = model.state_dict(keep_vars=True)
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def is_adapter(source: object) -> bool:
    """Whether it is a folder with an adapter in PEFT's format."""
    return isinstance(source, str | os.PathLike) and (Path(source) / CONFIG_FILE).is_file()


def _files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint, which is one or a folder as Transformers writes it."""
    if not path.exists():
        raise FileNotFoundError(f"{path} doesn't exist, expected a checkpoint")
    if not path.is_dir():
        return [path]
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if (path / INDEX).is_file():
        try:
            names = set(
                json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
            )
            files = [path / name for name in sorted(names)]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path / INDEX} is no index of a checkpoint: {error}") from error
        if any(file.parent != path for file in files):
            raise ValueError(f"{path / INDEX} names a file that is not in its folder")
        return files
    alone = sorted(path.glob("*.safetensors"))
    if len(alone) == 1:
        return alone
    found = ", ".join(sorted(one.name for one in path.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(
        f"{path} has neither {WEIGHTS} nor {INDEX} (pickles are never read); it holds {found}"
    )


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    safetensors()
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} doesn't exist, expected a file of the checkpoint")
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    with file as tensors:
        yield tensors
