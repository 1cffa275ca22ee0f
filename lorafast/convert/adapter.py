"""``Adapter``: an adapter outside a model, the content of the two files of PEFT's format."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafast.convert.adapter_pair import check_folder, read_pair, safetensors, write_pair
from lorafast.convert.kinds import EMBEDDING, FACTORS
from lorafast.convert.peft_format import PREFIX, AdapterConfig, parse_config, regex_of

_CONFIG = Path("the adapter's config")
# PEFT's name of the output projection inside an attention that it wraps: one adapter with it.
OUT_PROJ = ".base_layer.out_proj"


@dataclass(frozen=True, repr=False, eq=False)
class Adapter:
    """An adapter outside a model: what PEFT's two files hold.

    ``lorafast.load_adapter`` puts it into a model, ``lorafast.save_adapter`` writes it to a folder.
    ``lorafast.combine``, ``lorafast.extract`` and ``lorafast.import_adapter`` make them.
    """

    config: dict[str, Any]
    """The content of ``adapter_config.json``."""
    tensors: dict[str, Tensor]
    """The tensors of ``adapter_model.safetensors``, by PEFT's names."""

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> "Adapter":
        """Reads an adapter that ``save_adapter`` or PEFT's ``save_pretrained`` wrote.

        Raises:
            FileNotFoundError: ``folder`` has no config or no safetensors file. Pickles are never read.
            ValueError: a file can't be read, or lorafast doesn't compute what it says.
        """
        safetensors()
        (raw, _), tensors = read_pair(
            Path(folder), lambda raw, path: (raw, parse_config(raw, path))
        )
        assert isinstance(raw, dict)
        return cls(raw, tensors)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """``lorafast.save_adapter(self, folder)``."""
        safetensors()
        check_folder(Path(folder))
        # Copies: safetensors refuses tensors that share memory, and strides.
        copies = {key: t.detach().cpu().clone().contiguous() for key, t in self.tensors.items()}
        write_pair(Path(folder), self.config, copies)

    def parsed(self) -> AdapterConfig:
        """The config as layers have it; ``ValueError`` if lorafast doesn't compute what it says."""
        return parse_config(self.config, _CONFIG)

    def __repr__(self) -> str:
        layers = sum(key.endswith(tuple(f".{one}" for one in FACTORS)) for key in self.tensors)
        numbers = sum(tensor.numel() for tensor in self.tensors.values())
        return f"Adapter(r={self.config.get('r')}, {layers} layers, {numbers:,} numbers)"


@dataclass(frozen=True, eq=False)
class Pair:
    """The two factors of one layer's adapter: ``scaling · B·A`` is what it adds to the weight."""

    name: str
    """The layer's, in the model."""
    key_A: str
    key_B: str
    A: Tensor
    """``[r, in_features]``, of a convolution ``[r, C, *kernel]``."""
    B: Tensor
    """``[out_features, r]``, of a convolution ``[N, r / groups, 1, …]``."""
    scaling: float

    @property
    def r(self) -> int:
        """The rank."""
        return self.A.shape[0]

    @property
    def groups(self) -> int:
        """Those of a convolution; 1 of any other layer."""
        return self.A.shape[0] // self.B.shape[1]

    @property
    def is_embedding(self) -> bool:
        """Whether the layer is an embedding, whose weight is ``[in_features, out_features]``."""
        return self.key_A.endswith(EMBEDDING[0])


Source = Adapter | str | os.PathLike[str] | tuple[Any, Mapping[str, Tensor]]
"""What functions take for an adapter: one, a folder, or PEFT's config and state dict."""


def adapter_of(source: Source) -> Adapter:
    """The adapter that ``source`` is or names.

    Raises:
        TypeError: it is none of those.
        FileNotFoundError, ValueError: as for ``Adapter.from_folder``.
    """
    if isinstance(source, Adapter):
        return source
    if isinstance(source, (str, os.PathLike)):
        return Adapter.from_folder(source)
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], Mapping):
        config = source[0].to_dict() if hasattr(source[0], "to_dict") else source[0]
        if isinstance(config, Mapping):
            return Adapter({k: _plain(v) for k, v in config.items()}, dict(source[1]))
    raise TypeError(
        f"an adapter is {type(source).__name__}, expected a folder, a lorafast.Adapter, or a tuple "
        "(config, state dict) in PEFT's format"
    )


def _plain(value: Any) -> Any:
    """As JSON has it: PEFT keeps names in sets, and kinds in enumerations."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return getattr(value, "value", value) if isinstance(value, str) else value


def pairs_of(adapter: Adapter) -> Iterator[Pair]:
    """The adapters of the layers, in the order of the tensors.

    Raises:
        ValueError: a factor is missing or doesn't fit the other, or the config says something that
            lorafast doesn't compute.
    """
    config = adapter.parsed()
    for key, A in adapter.tensors.items():
        of_B = next((one for one in FACTORS if key.endswith(f".{FACTORS[one]}")), None)
        if of_B is not None and key.removesuffix(FACTORS[of_B]) + of_B not in adapter.tensors:
            raise ValueError(
                f"the adapter has {key} and no {key.removesuffix(FACTORS[of_B])}{of_B}"
            )
        ending = next((one for one in FACTORS if key.endswith(f".{one}")), None)
        if ending is None:
            continue
        _check_begins(key)
        name = key.removesuffix(f".{ending}").removeprefix(PREFIX)
        key_B = key.removesuffix(ending) + FACTORS[ending]
        B = adapter.tensors.get(key_B)
        if B is None:
            raise ValueError(f"the adapter has {key} and no {key_B}")
        if not _go_together(A, B):
            raise ValueError(
                f"{key} has shape {list(A.shape)} and {key_B} {list(B.shape)}, expected "
                "[r, in_features] and [out_features, r]"
            )
        whole = name.removesuffix(OUT_PROJ) if name.endswith(OUT_PROJ) else name
        r = A.shape[0]
        scaling = config.alpha(whole) / (r**0.5 if config.use_rslora else r)
        yield Pair(name, key, key_B, A, B, scaling)


def _go_together(A: Tensor, B: Tensor) -> bool:
    """Whether they have one rank; B of a convolution in groups has that of a group."""
    if A.dim() < 2 or A.dim() != B.dim() or not A.shape[0] or not B.shape[1]:
        return False
    return A.shape[0] == B.shape[1] or (A.dim() > 2 and A.shape[0] % B.shape[1] == 0)


def others_of(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors that are no factor of an adapter: modules stored whole, base weights.

    Raises:
        ValueError: as for ``pairs_of``, or a name is neither such a tensor's nor a factor's.
    """
    pairs = list(pairs_of(adapter))
    factors = {pair.key_A for pair in pairs} | {pair.key_B for pair in pairs}
    others = {key: t for key, t in adapter.tensors.items() if key not in factors}
    for key in others:
        _check_begins(key)
        if any(part.startswith("lora_") for part in key.split(".")):
            raise ValueError(
                f"the adapter has {key}, which is no factor A or B that lorafast knows"
            )
    return others


def _check_begins(key: str) -> None:
    """Raises ``ValueError`` unless a tensor's name begins as PEFT's do."""
    if not key.startswith(PREFIX):
        raise ValueError(f"tensor {key!r} doesn't begin with {PREFIX!r}: not PEFT's format")


def patterns(
    r: int, alpha: float, ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> dict[str, Any]:
    """``r``, ``lora_alpha`` and the patterns of layers with another rank or alpha."""
    layers = {name for name in ranks if not name.endswith(OUT_PROJ)}
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {regex_of(n): ranks[n] for n in ranks if n in layers and ranks[n] != r},
        "alpha_pattern": {
            regex_of(n): alphas[n] for n in alphas if n in layers and alphas[n] != alpha
        },
    }


def float_of(tensor: Tensor) -> Tensor:
    """``tensor`` in float32, or float64 if it is that: PEFT's dtype of an adapter that it loads."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def saved(adapter: Adapter, folder: str | os.PathLike[str] | None) -> Adapter:
    """``adapter``, written to ``folder`` if there is one."""
    if folder is not None:
        adapter.save(folder)
    return adapter
