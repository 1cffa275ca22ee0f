"""``import_adapter`` and ``export_adapter``: adapters in the layouts of diffusion models' files.

The tensors of one layer, ``A [r, in_features]`` and ``B [out_features, r]``, are called

- by kohya's scripts ``lora_unet_<layer>.lora_down.weight`` and ``….lora_up.weight``, with ``….alpha``
  beside them (alpha is r where there is none); ``<layer>`` has ``_`` for each dot of its name, which
  in files for SDXL's U-Net is that of the original code (``unet_names``);
- by diffusers ``unet.<layer>`` and then as by PEFT; before that ``….lora.down.weight`` and
  ``….lora.up.weight``, in text encoders ``….lora_linear_layer.down.weight``; and at first
  ``….processor.to_q_lora.down.weight`` for ``….to_q``. alpha is r, unless the metadata have
  PEFT's config.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn, tensor

from lorafast.convert.adapter import (
    Adapter,
    Source,
    adapter_of,
    others_of,
    pairs_of,
    patterns,
    saved,
)
from lorafast.convert.adapter_pair import safetensors
from lorafast.convert.kinds import LINEAR, kind_of_layer
from lorafast.convert.peft_format import PREFIX, AdapterConfig, parse_config, shortest_targets
from lorafast.convert.targets import closest, names_by_layer, unwrapped
from lorafast.convert.unet_names import original_names
from lorafast.core.dtypes import FLOATS
from lorafast.core.files import write_whole
from lorafast.nn import AdapterLayer

Layout = Literal["kohya", "kohya-original", "diffusers", "diffusers-old"]
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
_KOHYA = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
# Transformers before release 5 has the layers of CLIP's text encoder inside this.
_TEXT_MODEL = "text_model."
_METADATA = "lora_adapter_metadata"
# The endings of A's and B's names, and what of them belongs to the layer's.
_ENDINGS = {
    ".lora_down.weight": "A", ".lora_up.weight": "B",
    f".{LINEAR[0]}": "A", f".{LINEAR[1]}": "B",
    ".lora.down.weight": "A", ".lora.up.weight": "B",
    ".lora_linear_layer.down.weight": "A", ".lora_linear_layer.up.weight": "B",
    "_lora.down.weight": "A", "_lora.up.weight": "B",
    ".alpha": "alpha",
}  # fmt: skip
_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# By the end of a key: a layer may be called so too.
_REFUSED = {
    r"\.lora_mid(\.weight)?": (
        "a convolution's lora_mid (Tucker's decomposition) makes A a product of two"
    ),
    r"\.(dora_scale|lora_magnitude_vector(\.\w+)*)": (
        "it is DoRA's magnitude, whose axis these files don't agree on"
    ),
    r"\.hada_\w+": "it is LoHa's, a product element by element",
    r"\.lokr_\w+": "it is LoKr's, a Kronecker product",
    r"\.oft_\w+": "it is OFT's, a rotation",
    r"\.diff(_b)?": "it is a whole difference: extract an adapter from it",
    r"[.]lora_B[.]bias": "it is a bias of B, which no layer of lorafast has",
}


@dataclass
class _Found:
    """What a file has for one layer, each with its key."""

    keys: dict[str, str] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)


def import_adapter(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    model: nn.Module,
    part: str | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
) -> Adapter:
    """An adapter from a file in kohya's layout or one of diffusers', for ``model``.

    ``model`` says which layers there are: kohya's names have underscores for dots, and only the
    model tells them apart. Factors are copied as they are, in their dtype; where a layer is a 1 x 1
    convolution and the file has matrices, or the other way round, they are reshaped. ``scaling`` is
    ``alpha / r``.

    Args:
        source: a safetensors file, or its tensors.
        model: the model that the adapter is for, such as ``pipeline.unet``.
        part: which of the file's adapters: ``"unet"``, ``"transformer"``, ``"text_encoder"``,
            ``"text_encoder_2"`` or ``"text_encoder_3"``. None: the only one.
        folder: where to write the adapter too, in PEFT's format.

    Returns:
        The adapter, for ``load_adapter(model, ...)`` and ``save_adapter``.

    Raises:
        ValueError: a name is in no layout that is known, or that of no layer of ``model`` or of
            several, a factor is missing or doesn't fit its layer, a tensor is of another kind of
            adapter, the metadata say DoRA, PiSSA or OLoRA, or there are several parts and ``part``
            is None. The message has the first such key.
        FileNotFoundError: there is no such file.
    """
    if part is not None:
        _check_part(part)
    tensors, metadata = _read(source)
    model = unwrapped(model)
    names = _Names(model)
    found: dict[str, _Found] = {}
    parts = Counter(_part(key) for key in tensors if _part(key) is not None)
    if part is None and len(parts) > 1:
        raise ValueError(
            f"the file has adapters of {' and '.join(map(str, parts))}: name one as part"
        )
    for key, value in tensors.items():
        own = _part(key)
        if None not in (own, part) and own != part:
            continue
        reason = next((why for end, why in _REFUSED.items() if re.search(f"{end}$", key)), None)
        if reason is not None:
            raise ValueError(f"the file has {key}, which can't be imported: {reason}")
        layer, role = names.of(key, own)
        one = found.setdefault(layer, _Found())
        if role in one.keys:
            raise ValueError(f"the file has {one.keys[role]} and {key}, both {role} of {layer}")
        one.keys[role], one.values[role] = key, value
    if not found:
        raise ValueError(f"the file has no adapter of {part or 'the model'}")
    written = _config_in(metadata, part or next(iter(parts), None))
    layers = {layer: _fitting(layer, one, names.layers[layer]) for layer, one in found.items()}
    adapter = _adapter(layers, {n: _alpha(n, one, written) for n, one in found.items()}, model)
    return saved(adapter, folder)


def export_adapter(
    adapter: Source,
    layout: Layout,
    part: str = "unet",
    *,
    prefix: str | None = None,
    model: nn.Module | None = None,
    file: str | os.PathLike[str] | None = None,
) -> dict[str, Tensor]:
    """The tensors of ``adapter`` by the names of kohya's layout or one of diffusers'.

    kohya's layout has an alpha for each layer, ``r · scaling``. Diffusers' layouts have none: B is
    multiplied by ``scaling``.

    Args:
        adapter: a folder in PEFT's format, an ``Adapter``, or a tuple (config, state dict).
        layout: ``"kohya"``, ``"kohya-original"`` (with the names of the original U-Net, as kohya's
            scripts have them for SDXL), ``"diffusers"`` (``lora_A``, ``lora_B``), or ``"diffusers-old"``
            (``lora.down``, ``lora.up``, in text encoders ``lora_linear_layer``).
        part: the model that the adapter is of, as for ``import_adapter``.
        prefix: what comes before the layers' names; None is that of ``part``: ``lora_unet_``,
            ``lora_te_`` (SDXL has ``lora_te1_``), ``lora_te2_``, or ``unet.`` and so on. Files for CLIP
            have ``lora_te_text_model_``, where a model of Transformers 5 has no ``text_model``.
        model: the U-Net that the adapter is for, whose structure says what the original code calls its
            layers; for ``"kohya-original"`` alone.
        file: the safetensors file to write too.

    Raises:
        ValueError: an argument is unknown, ``model`` is missing or no U-Net of diffusers, two layers get
            one name, or the adapter has what the layout has no name for: DoRA, embeddings, modules
            stored whole.
        OSError: ``file`` can't be written.
    """
    name_of = _naming(layout, part, prefix, model)
    with_alpha = layout.startswith("kohya")
    adapter = adapter_of(adapter)
    if adapter.parsed().use_dora:
        raise ValueError(
            "the adapter has DoRA's magnitudes, which lorafast doesn't write in this layout"
        )
    for key in others_of(adapter):
        raise ValueError(f"the adapter has {key}, and the layout {layout!r} holds adapters alone")
    made: dict[str, Tensor] = {}
    for pair in pairs_of(adapter):
        if pair.is_embedding or ".base_layer." in pair.name:
            raise ValueError(f"the layout {layout!r} has no name for {pair.key_A}")
        B = pair.B if with_alpha or pair.scaling == 1 else pair.B * pair.scaling
        values = {"A": pair.A, "B": B}
        if with_alpha:
            values["alpha"] = tensor(pair.scaling * pair.r)
        for role, value in values.items():
            key = name_of(pair.name, role)
            if key in made:
                raise ValueError(f"two layers get the name {key}, one of them {pair.name}")
            made[key] = value.detach().cpu().clone().contiguous()
    if file is not None:
        write_whole(Path(file), safetensors().save(made, metadata={"format": "pt"}))
    return made


def _check_part(part: str) -> None:
    if part not in PARTS:
        raise ValueError(f"part is {part!r}, expected one of {', '.join(PARTS)}")


def _naming(
    layout: str, part: str, prefix: str | None, model: nn.Module | None
) -> Callable[[str, str], str]:
    """The key of a layer's A, B or alpha."""
    _check_part(part)
    if (model is not None) != (layout == "kohya-original"):
        expected = "a U-Net for" if model is None else "None but for"
        raise ValueError(f"model is {type(model).__name__}, expected {expected} 'kohya-original'")
    if layout in ("kohya", "kohya-original"):
        prefixes = {own: start for start, own in reversed(_KOHYA.items())}
        if prefix is None and part not in prefixes:
            raise ValueError(f"part is {part!r}, which kohya's layout has no prefix for: give one")
        start = prefixes[part] if prefix is None else prefix
        ending = {"A": "lora_down.weight", "B": "lora_up.weight", "alpha": "alpha"}
        called = _called if model is None else _originally(model)
        return lambda name, role: f"{start}{called(name).replace('.', '_')}.{ending[role]}"
    start = f"{part}." if prefix is None else prefix
    if layout == "diffusers":
        return lambda name, role: f"{start}{name}.lora_{role}.weight"
    if layout == "diffusers-old":
        middle = "lora_linear_layer" if part.startswith("text_encoder") else "lora"
        direction = {"A": "down", "B": "up"}
        return lambda name, role: f"{start}{name}.{middle}.{direction[role]}.weight"
    expected = "'kohya', 'kohya-original', 'diffusers' or 'diffusers-old'"
    raise ValueError(f"layout is {layout!r}, expected {expected}")


def _called(name: str) -> str:
    return name


def _originally(model: nn.Module) -> Callable[[str], str]:
    """What the original code calls a layer of ``model``."""
    names = original_names(name for name, _ in unwrapped(model).named_modules())
    if not names:
        raise ValueError(
            f"model is a {type(model).__name__}, expected a U-Net of diffusers, with conv_in and "
            "down_blocks"
        )

    def call(name: str) -> str:
        if name not in names:
            raise ValueError(f"the original U-Net has no name for {name}")
        return names[name]

    return call


def _read(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    if isinstance(source, Mapping):
        return dict(source), {}
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file, expected one of safetensors")
    safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {key: file.get_tensor(key) for key in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _part(key: str) -> str | None:
    """The model that a key names by its prefix."""
    for start, part in _KOHYA.items():
        if key.startswith(start):
            return part
    first = key.partition(".")[0]
    return first if first in PARTS else None


class _Names:
    """The layers of a model, found by the names that files have for them."""

    def __init__(self, model: nn.Module) -> None:
        found = names_by_layer(model)
        self.layers = {name: layer for layer, names in found.items() for name in names if name}
        self._first = {name: names[0] for names in found.values() for name in names}
        self._underscored: dict[str, list[str]] = {}
        for names in found.values():
            for name in names:
                same = self._underscored.setdefault(name.replace(".", "_"), [])
                if names[0] not in same:
                    same.append(names[0])
        self._original = {
            theirs.replace(".", "_"): ours
            for ours, theirs in original_names(name for name, _ in model.named_modules()).items()
            if ours in self.layers
        }

    def of(self, key: str, part: str | None) -> tuple[str, str]:
        """The layer that ``key`` is of, and whether it is its A, B or alpha."""
        ending = next((one for one in _ENDINGS if key.endswith(one)), None)
        if ending is None:
            raise ValueError(f"the file has {key}, a name in no layout that is known")
        name = key.removesuffix(ending)
        prefix = next((start for start in _KOHYA if key.startswith(start)), None)
        if prefix is not None:
            return self._of_underscored(key, name.removeprefix(prefix)), _ENDINGS[ending]
        whole = name.replace(".processor.", ".")
        name = whole.removeprefix(f"{part}.") if part else whole
        # A model's own first module may have a part's name.
        candidates = [name, whole, name.removeprefix(_TEXT_MODEL)]
        if ending.startswith("_lora"):
            owner, _, last = name.rpartition(".")
            others = [_PROJECTIONS[last]] if last in _PROJECTIONS else []
            candidates += [
                f"{owner}.{one}" for one in ([f"{last}.0"] if last == "to_out" else []) + others
            ]
        for candidate in candidates:
            if candidate in self.layers:
                return self._first[candidate], _ENDINGS[ending]
        raise ValueError(self._unknown(key, name, self.layers))

    def _of_underscored(self, key: str, name: str) -> str:
        names = self._underscored.get(name) or self._underscored.get(
            name.removeprefix(_TEXT_MODEL.replace(".", "_")), []
        )
        if len(names) > 1:
            raise ValueError(f"the file has {key}, which may be {' or '.join(names)} of the model")
        if not names and name in self._original:
            return self._original[name]
        if not names:
            raise ValueError(self._unknown(key, name, self._underscored | self._original))
        return names[0]

    @staticmethod
    def _unknown(key: str, name: str, known: Mapping[str, Any]) -> str:
        close = closest(name, known)
        hint = f" (the nearest is {close})" if close else ""
        return f"the file has {key}, and the model has no layer of that name{hint}"


def _fitting(layer: str, found: _Found, module: nn.Module) -> dict[str, Tensor]:
    """A and B in the shapes that the layer's adapter has."""
    for role, other in (("A", "B"), ("B", "A")):
        if role not in found.values:
            key = found.keys.get(other, next(iter(found.keys.values())))
            raise ValueError(f"the file has {key}, and no {role} for {layer}")
    for role in ("A", "B"):
        if found.values[role].dtype not in FLOATS:
            raise ValueError(
                f"{found.keys[role]} is {found.values[role].dtype}, expected a float of 16 bits or more"
            )
        if found.values[role].dim() < 2 or not found.values[role].numel():
            raise ValueError(
                f"{found.keys[role]} has shape {list(found.values[role].shape)}, expected a matrix or a "
                "convolution's weight"
            )
    kind = kind_of_layer(module)
    adapted = isinstance(module, AdapterLayer)
    sizes: tuple[int, int] = kind.features(module) if not adapted else _sizes(module)
    shapes = kind.layer.shapes_over(module, sizes, found.values["A"].shape[0])
    if [kind.layer.peft_names[name] for name in shapes] != [*LINEAR]:
        raise ValueError(
            f"the file has {found.keys['A']}, and {layer} is a {type(module).__name__}, expected a "
            "linear layer or a convolution"
        )
    made = {}
    for role, ending, shape in zip("AB", LINEAR, shapes.values(), strict=True):
        value = found.values[role]
        if _trimmed(value.shape) != _trimmed(shape):
            raise ValueError(
                f"{found.keys[role]} has shape {list(value.shape)}, expected {list(shape)} for {layer}"
            )
        made[ending] = value.detach().reshape(shape).clone()
    return made


def _sizes(layer: Any) -> tuple[int, int]:
    return layer.in_features, layer.out_features


def _trimmed(shape: tuple[int, ...]) -> list[int]:
    """``shape`` as a matrix's where it is that of a 1 x 1 convolution."""
    return list(shape[:2]) if all(size == 1 for size in shape[2:]) else list(shape)


def _config_in(metadata: Mapping[str, str], part: str | None) -> AdapterConfig | None:
    """PEFT's config that diffusers writes into a file's metadata, if there is one for ``part``."""
    if _METADATA not in metadata or part is None:
        return None
    where = Path(f"the metadata's {_METADATA}")
    try:
        raw = json.loads(metadata[_METADATA])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    start = f"{part}."
    if not isinstance(raw, dict) or not any(key.startswith(start) for key in raw):
        return None
    own = {key.removeprefix(start): value for key, value in raw.items() if key.startswith(start)}
    config = parse_config({"peft_type": "LORA"} | own, where)
    if config.init_lora_weights is not None:
        raise ValueError(
            f"init_lora_weights in {where} is {config.init_lora_weights!r}: the adapter belongs to what "
            "that has left of the model's weights, and the model here is a plain one"
        )
    if config.use_dora:
        raise ValueError(f"use_dora in {where} is true: DoRA's magnitudes can't be imported")
    return config


def _alpha(layer: str, found: _Found, written: AdapterConfig | None) -> float:
    """``r · scaling``."""
    r = found.values["A"].shape[0]
    if "alpha" in found.values:
        alpha = found.values["alpha"]
        if alpha.numel() != 1 or alpha.is_complex() or not math.isfinite(alpha.item()):
            raise ValueError(
                f"{found.keys['alpha']} has shape {list(alpha.shape)} and is {alpha.tolist()!r}, "
                "expected a finite number"
            )
        return float(alpha.item())
    if written is None:
        return float(r)
    return written.alpha(layer) * (r**0.5 if written.use_rslora else 1)


def _adapter(
    layers: Mapping[str, dict[str, Tensor]], alphas: Mapping[str, float], model: nn.Module
) -> Adapter:
    ranks = {name: parameters[LINEAR[0]].shape[0] for name, parameters in layers.items()}
    modules = [name for name, _ in model.named_modules()]
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "target_modules": shortest_targets(layers, modules),
        "modules_to_save": None,
    } | patterns(_most(ranks.values()), _most(alphas.values()), ranks, alphas)
    return Adapter(config, dict(_named(layers)))


def _most(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


def _named(layers: Mapping[str, dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, parameters in layers.items():
        for ending, value in parameters.items():
            yield f"{PREFIX}{name}.{ending}", value
