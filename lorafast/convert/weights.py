"""``Weights``: the tensors of a model or a checkpoint by name, read one at a time."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorafast.convert.adapter_pair import safetensors
from lorafast.convert.peft_format import WEIGHTS_FILE
from lorafast.convert.targets import unwrapped

_INDEX = ".safetensors.index.json"
_WHOLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")

Checkpoint = nn.Module | str | os.PathLike[str] | Mapping[str, Tensor]
"""A model, a safetensors file or a folder of some, or a state dict."""


class Weights:
    """Tensors by name. Of files only the one that is asked for is in memory.

    Raises:
        FileNotFoundError: there is no safetensors file. Pickles are never read.
        ValueError: a file can't be read.
        TypeError: the source is none.
    """

    def __init__(self, argument: str, source: Checkpoint) -> None:
        self.argument = argument
        if isinstance(source, nn.Module):
            source = unwrapped(source)
        self.model = source if isinstance(source, nn.Module) else None
        self._files: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}
        if isinstance(source, nn.Module):
            state = source.state_dict(keep_vars=True)
            self._tensors = {name: t for name, t in state.items() if isinstance(t, Tensor)}
        elif isinstance(source, Mapping):
            self._tensors = dict(source)
        elif isinstance(source, (str, os.PathLike)):
            for file in _files(argument, Path(source)):
                self._files |= dict.fromkeys(file.keys(), file)
        else:
            raise TypeError(
                f"{argument} is {type(source).__name__}, expected a model, a state dict, a safetensors "
                "file or a folder of some"
            )

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._files or self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors or name in self._files

    def __getitem__(self, name: str) -> Tensor:
        if name in self._files:
            read: Tensor = self._files[name].get_tensor(name)
            return read
        tensor = self._tensors[name].detach()
        if tensor.is_meta:
            raise ValueError(
                f"{name} of {self.argument} is on the device meta, which holds no values"
            )
        if hasattr(tensor, "full_tensor"):
            raise ValueError(f"{name} of {self.argument} is sharded: gather the model first")
        return tensor

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, which is not read for it."""
        if name in self._files:
            return list(self._files[name].get_slice(name).get_shape())
        return list(self._tensors[name].shape)

    def modules(self) -> list[str]:
        """The names of the modules, of a checkpoint those that hold tensors."""
        if self.model is not None:
            return [name for name, _ in self.model.named_modules() if name]
        parts = [name.split(".")[:-1] for name in self.names]
        return sorted({".".join(one[: i + 1]) for one in parts for i in range(len(one))})

    def shared_with(self, name: str) -> list[str]:
        """Other names of the same tensor of a model."""
        own = self._tensors.get(name)
        return [other for other, t in self._tensors.items() if t is own and other != name]


def _files(argument: str, path: Path) -> list[Any]:
    safetensors()
    from safetensors import SafetensorError, safe_open

    found = []
    for file in _paths(argument, path):
        try:
            found.append(safe_open(file, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is not a safetensors file: {error}") from error
    return found


def _paths(argument: str, path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{argument} is {path}, which doesn't exist")
    for index in sorted(path.glob(f"*{_INDEX}")):
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [path / shard for shard in sorted(set(shards))]
    for name in _WHOLE:
        if (path / name).is_file():
            return [path / name]
    found = sorted(one for one in path.glob("*.safetensors") if one.name != WEIGHTS_FILE)
    if not found:
        raise FileNotFoundError(f"{argument} is {path}, which holds no safetensors file")
    return found
