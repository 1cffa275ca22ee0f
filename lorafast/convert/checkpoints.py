"""The tensors of another model: a model's, a ``state_dict``'s or a checkpoint's, read one at a time."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorafast.convert.adapter_pair import safetensors
from lorafast.convert.peft_format import CONFIG_FILE, WEIGHTS_FILE
from lorafast.convert.targets import unwrapped

Checkpoint = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]
"""A model, a state dict, a safetensors file, or a folder as Transformers or Diffusers writes it."""
_NAMES = ("model", "diffusion_pytorch_model")
"""What the weights are called in such a folder."""


class Tensors:
    """Tensors by key: their keys and shapes at once, the values where they are asked for."""

    def __init__(
        self,
        argument: str,
        name: str,
        shapes: Mapping[str, tuple[int, ...]],
        model: nn.Module | None,
    ) -> None:
        self.argument, self.name, self.model = argument, name, model
        """Whose argument it is, what it is called in messages, and the model if it is one."""
        self.shapes = dict(shapes)

    def read(self, key: str) -> Tensor:
        """The tensor of this key.

        Raises:
            ValueError: it is on meta, or sharded.
        """
        raise NotImplementedError

    def modules(self) -> list[str]:
        """The names of the modules; of a checkpoint of those that hold tensors."""
        if self.model is not None:
            return [name for name, _ in self.model.named_modules() if name]
        parts = [key.split(".")[:-1] for key in self.shapes]
        return sorted({".".join(one[: i + 1]) for one in parts for i in range(len(one))})

    def shared_with(self, key: str) -> list[str]:
        """Other keys of the same tensor, where it is in memory."""
        return []


class _InMemory(Tensors):
    def __init__(
        self,
        argument: str,
        name: str,
        tensors: Mapping[str, Tensor],
        model: nn.Module | None = None,
    ) -> None:
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        super().__init__(argument, name, shapes, model)
        self._tensors = tensors

    def read(self, key: str) -> Tensor:
        tensor = self._tensors[key].detach()
        if tensor.is_meta:
            raise ValueError(f"{key} of {self.name} is on the device meta, which holds no values")
        if hasattr(tensor, "full_tensor"):  # a DTensor, whose module is slow to import
            raise ValueError(f"{key} of {self.name} is sharded: gather the model first")
        return tensor

    def shared_with(self, key: str) -> list[str]:
        own = self._tensors.get(key)
        return [other for other, one in self._tensors.items() if one is own and other != key]


class _InFiles(Tensors):
    def __init__(self, argument: str, name: str, file_of: Mapping[str, Any]) -> None:
        self._file_of = file_of
        shapes = {k: tuple(file.get_slice(k).get_shape()) for k, file in file_of.items()}
        super().__init__(argument, name, shapes, None)

    def read(self, key: str) -> Tensor:
        tensor: Tensor = self._file_of[key].get_tensor(key)
        return tensor


@contextlib.contextmanager
def opened(source: Checkpoint, argument: str, name: str | None = None) -> Iterator[Tensors]:
    """The tensors of ``source``, for the time of the block; ``name``: what messages call a model.

    Of a folder with ``model.safetensors`` or ``diffusion_pytorch_model.safetensors`` it is that file,
    else that of its index; else the only safetensors file that is no adapter's.

    Raises:
        TypeError: it is none of these, or a ``state_dict`` holds anything but tensors.
        FileNotFoundError: there is no such file, or none in the folder. Pickles are never read.
        ValueError: a file can't be read, or an index names what isn't there.
        ImportError: safetensors is not installed.
    """
    if isinstance(source, nn.Module):
        model = unwrapped(source)
        yield _InMemory(argument, name or argument, state_of(model), model)
    elif isinstance(source, Mapping):
        for key, value in source.items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{key} of {argument}, a state dict, is a {type(value).__name__}: no tensor"
                )
        yield _InMemory(argument, "the state dict" if name else argument, source)
    elif isinstance(source, str | os.PathLike):
        with contextlib.ExitStack() as stack:
            files, index = _files(argument, Path(source))
            by_path = {path: stack.enter_context(_open(path)) for path in files}
            yield _InFiles(argument, str(source), _placed(by_path, index))
    else:
        raise TypeError(
            f"{argument} is a {type(source).__name__}, expected a model, a state dict or a checkpoint's "
            "path"
        )


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, a shared one under each of its names."""
    state = model.state_dict(keep_vars=True)
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def is_adapter(source: object) -> bool:
    """Whether it is a folder with an adapter in PEFT's format."""
    return isinstance(source, str | os.PathLike) and (Path(source) / CONFIG_FILE).is_file()


def _files(argument: str, path: Path) -> tuple[list[Path], dict[str, Path] | None]:
    """The safetensors files of a checkpoint, and where an index says that the keys are."""
    if path.is_file():
        return [path], None
    if not path.is_dir():
        raise FileNotFoundError(f"{argument} is {path}, which doesn't exist, expected a checkpoint")
    for name in _NAMES:
        whole = path / f"{name}.safetensors"
        index = path / f"{name}.safetensors.index.json"
        if whole.is_file():
            return [whole], None
        if index.is_file():
            placed = _read_index(index)
            return sorted(set(placed.values())), placed
    alone = [one for one in path.glob("*.safetensors") if one.name != WEIGHTS_FILE]
    if len(alone) == 1:
        return alone, None
    found = ", ".join(sorted(one.name for one in path.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(
        f"{argument} is {path}, which has neither {' nor '.join(f'{n}.safetensors' for n in _NAMES)}, "
        f"nor an index of one (pickles are never read); it holds {found}"
    )


def _read_index(path: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        placed = {key: path.parent / name for key, name in weight_map.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of a checkpoint: {error}") from error
    if not placed:
        raise ValueError(f"{path} is no index of a checkpoint: its weight_map is empty")
    if any(file.parent != path.parent for file in placed.values()):
        raise ValueError(f"{path} names a file that is not in its folder")
    return placed


def _placed(files: dict[Path, Any], index: dict[str, Path] | None) -> dict[str, Any]:
    """The file of each key: what the index says, or all keys of the only file."""
    if index is None:
        return {key: file for file in files.values() for key in file.keys()}  # noqa: SIM118
    keys = {path: set(file.keys()) for path, file in files.items()}
    for key, path in index.items():
        if key not in keys[path]:
            raise ValueError(f"the index says that {key} is in {path.name}, which hasn't it")
    return {key: files[path] for key, path in index.items()}


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    safetensors()
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} doesn't exist, expected a file of the checkpoint")
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    with file as tensors:
        yield tensors
