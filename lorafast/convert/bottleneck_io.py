"""Bottleneck adapters as files: ``adapter_config.json`` and ``adapter_model.safetensors``.

    {"adapter": "bottleneck", "version": 1, "modules_to_save": [],
     "places": {"encoder.layer.0.output.dropout": {
         "in_features": 768, "bottleneck": 48, "out_features": 768, "activation": "silu",
         "scaling": 1.0, "layer_norm": false, "parallel": false}}}

A place may have ``"stands": "norm"`` or ``"residual"`` too (``lorafast.nn.bottleneck.STANDS``).

The safetensors file has ``<place>.bottleneck.down``, ``down_bias``, ``up``, ``up_bias``, with a
LayerNorm ``norm.weight`` and ``norm.bias``, and the tensors of modules stored whole under their own
names. The names are those that the model's ``state_dict()`` has.
"""

import functools
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafast.convert.adapt import put_bottlenecks
from lorafast.convert.all_or_nothing import all_or_nothing, copy_into
from lorafast.convert.bottlenecks import bottlenecks, device_and_dtype, why_not_here, widths
from lorafast.convert.exchange import like, why_not_replaceable
from lorafast.convert.fsdp import name_of_sharded
from lorafast.convert.targets import check_without_peft
from lorafast.core.dtypes import FLOATS
from lorafast.core.problem import ACTIVATIONS
from lorafast.nn.bottleneck import CHILD, STANDS, Bottleneck

ADAPTER = "bottleneck"
_VERSION = 1


@dataclass(frozen=True)
class Place:
    """A bottleneck of the file, as ``Bottleneck`` takes it."""

    in_features: int
    bottleneck: int
    out_features: int
    activation: str
    scaling: float
    layer_norm: bool
    parallel: bool
    stands: str = STANDS[0]

    @classmethod
    def of(cls, one: Bottleneck) -> "Place":
        """What the file says of one."""
        return cls(
            one.in_features, one.bottleneck, one.out_features, one.activation, one.scaling,
            one.norm is not None, one.parallel, one.stands,
        )  # fmt: skip

    def make(self, device: torch.device, dtype: torch.dtype) -> Bottleneck:
        """A new one."""
        made = Bottleneck(
            self.in_features, self.bottleneck, self.out_features, activation=self.activation,
            scaling=self.scaling, layer_norm=self.layer_norm, device=device, dtype=dtype,
        )  # fmt: skip
        made.parallel, made.stands = self.parallel, self.stands
        return made

    def fields(self) -> dict[str, Any]:
        """What the file has for it."""
        own = asdict(self)
        if self.stands == STANDS[0]:  # which files of earlier versions don't say
            del own["stands"]
        return own

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of its tensors, by name."""
        K, b, N = self.in_features, self.bottleneck, self.out_features
        found: dict[str, tuple[int, ...]] = {
            "down": (b, K), "down_bias": (b,), "up": (N, b), "up_bias": (N,),
        }  # fmt: skip
        return found | ({"norm.weight": (K,), "norm.bias": (K,)} if self.layer_norm else {})


@dataclass(frozen=True)
class BottleneckConfig:
    """The config file, parsed."""

    places: dict[str, Place]
    modules_to_save: tuple[str, ...]


def describe(model: nn.Module, modules_to_save: tuple[str, ...]) -> dict[str, Any]:
    """What the config file says of a model's bottlenecks."""
    places = {name: Place.of(one).fields() for name, one in bottlenecks(model).items()}
    return {
        "adapter": ADAPTER,
        "version": _VERSION,
        "places": places,
        "modules_to_save": list(modules_to_save),
    }


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's bottlenecks, by the names that the file has."""
    return {
        f"{name}.{CHILD}.{parameter}": tensor
        for name, one in bottlenecks(model).items()
        for parameter, tensor in one.named_parameters()
    }


def is_bottleneck_config(raw: object) -> bool:
    """Whether a config file is of this format."""
    return isinstance(raw, dict) and raw.get("adapter") == ADAPTER


def is_finite(value: object) -> bool:
    """Whether it is a number that a float holds: JSON's integers may be larger."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "in_features": ("an integer of at least 1", lambda v: type(v) is int and 1 <= v < 2**31),
    "bottleneck": ("an integer of at least 1", lambda v: type(v) is int and 1 <= v < 2**31),
    "out_features": ("an integer of at least 1", lambda v: type(v) is int and 1 <= v < 2**31),
    "activation": (f"one of {', '.join(ACTIVATIONS)}", lambda v: v in ACTIVATIONS),
    "scaling": ("a finite number", lambda v: is_finite(v)),
    "layer_norm": ("true or false", lambda v: isinstance(v, bool)),
    "parallel": ("true or false", lambda v: isinstance(v, bool)),
    "stands": (f"one of {', '.join(STANDS)}", lambda v: v in STANDS),
}


def parse(raw: object, path: Path) -> BottleneckConfig:
    """The config.

    Raises:
        ValueError: a field is missing, unknown, or not what it must be.
    """
    assert isinstance(raw, dict)
    known = ("adapter", "version", "places", "modules_to_save")
    for name in raw:
        if name not in known:
            raise ValueError(f"{path} has the unknown field {name!r}")
    if raw.get("version") != _VERSION:
        raise ValueError(f"version is {raw.get('version')!r} in {path}, expected {_VERSION}")
    places, saved = raw.get("places"), raw.get("modules_to_save", [])
    if not isinstance(places, dict) or not places:
        raise ValueError(f"places is {places!r} in {path}, expected what stands at each module")
    if not isinstance(saved, list) or not all(isinstance(one, str) and one for one in saved):
        raise ValueError(f"modules_to_save is {saved!r} in {path}, expected a list of names")
    found = {}
    for name, fields in places.items():
        needed = _FIELDS.keys() - {"stands"}
        if not isinstance(fields, dict) or fields.keys() - {"stands"} != needed:
            expected = ", ".join(name for name in _FIELDS if name in needed)
            raise ValueError(f"the place {name!r} in {path} must have the fields {expected}")
        for field, (expected, fits) in _FIELDS.items():
            value = fields.get(field, STANDS[0])
            if not isinstance(value, str | int | float | bool) or not fits(value):
                raise ValueError(f"{field} of {name} is {value!r} in {path}, expected {expected}")
        found[name] = Place(**fields)
        if found[name].parallel and found[name].stands != STANDS[0]:
            raise ValueError(
                f"stands of {name} is {found[name].stands!r} in {path}, and parallel is true: expected "
                "one of them"
            )
    return BottleneckConfig(found, tuple(saved))


def split(
    config: BottleneckConfig, tensors: dict[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of each place, checked, and all others.

    Raises:
        ValueError: one is missing or doesn't fit the config.
    """
    left = dict(tensors)
    found: dict[str, dict[str, Tensor]] = {}
    for name, place in config.places.items():
        found[name] = {}
        for parameter, shape in place.shapes().items():
            key = f"{name}.{CHILD}.{parameter}"
            if key not in left:
                raise ValueError(f"the file has no {key}, which the config describes")
            tensor = found[name][parameter] = left.pop(key)
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{key} has shape {list(tensor.shape)} in the file, expected {list(shape)} by the "
                    "config"
                )
            if tensor.dtype not in FLOATS:
                raise ValueError(
                    f"{key} is {tensor.dtype} in the file, expected float16, bfloat16, float32 or "
                    "float64"
                )
    return found, left


def check_places(model: nn.Module, config: BottleneckConfig) -> None:
    """Raises ``ValueError`` unless each place is there, and empty or like that of the file."""
    modules = dict(model.named_modules())
    there = bottlenecks(model)
    absent = {modules[name] for name in config.places if name in modules and name not in there}
    if absent:
        check_without_peft(model)
    sharded = name_of_sharded(model, absent)
    if sharded is not None:
        raise ValueError(
            f"{sharded} is sharded by FSDP, expected a whole model: load the adapter before that, or "
            "adapt the model before that"
        )
    for name, place in config.places.items():
        if name not in modules:
            raise ValueError(f"the file has a bottleneck at {name}, which the model doesn't have")
        if name not in there:
            reason = why_not_here(model, [name], modules[name], place.parallel)
            if reason is not None:
                raise ValueError(f"{name} can't take the file's bottleneck: {reason}")
            _check_widths(model, name, modules[name], place)
            continue
        own = Place.of(there[name])
        for field in _FIELDS:
            if getattr(own, field) != getattr(place, field):
                raise ValueError(
                    f"{field} of the bottleneck at {name} is {getattr(own, field)!r}, and in the file "
                    f"{getattr(place, field)!r}"
                )
        for parameter, tensor in there[name].named_parameters():
            reason = why_not_replaceable(tensor)
            if reason is not None:
                raise ValueError(f"{parameter} of {name} can't be replaced: {reason}")
            shape = place.shapes()[parameter]
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{parameter} of the bottleneck at {name} has shape {list(tensor.shape)}, expected "
                    f"{list(shape)}: it was replaced, or FullyShardedDataParallel keeps it flat"
                )
    for name in there:
        if name not in config.places:
            raise ValueError(f"{name} has a bottleneck, and the file has none for it")


def _check_widths(model: nn.Module, name: str, module: nn.Module, place: Place) -> None:
    """Compares those of the file with those of the module, where these can be told."""
    try:
        own = widths(model, name, module, place.parallel)
    except ValueError:
        return
    if own != (place.in_features, place.out_features):
        raise ValueError(
            f"the file's bottleneck at {name} is {place.in_features} → {place.out_features} features "
            f"wide, expected {own[0]} → {own[1]}"
        )


def put_into(
    model: nn.Module,
    config: BottleneckConfig,
    adapters: dict[str, dict[str, Tensor]],
    base: list[tuple[Tensor, Tensor]],
    is_trainable: bool | None,
) -> None:
    """Puts in place what isn't there, and copies the values: all was checked. Where it fails nonetheless
    the model is as it was."""
    with torch.inference_mode(False), torch.no_grad(), all_or_nothing(model) as undo:
        there = bottlenecks(model)
        made: dict[str, Bottleneck] = {}
        for name, place in config.places.items():
            if name not in there:
                device, _ = device_and_dtype(model, name)
                made[name] = place.make(device, _widest(adapters[name].values()))
                made[name].train(model.get_submodule(name).training)
        every = there | made
        values = list(base)
        for name, parameters in adapters.items():
            own = dict(every[name].named_parameters())
            values += [(own[parameter], value) for parameter, value in parameters.items()]
        undo.keep([target for target, _ in values], [])
        for target, value in values:
            copy_into(target, like(value, target))
        if made:
            put_bottlenecks(model, {model.get_submodule(name): one for name, one in made.items()})
        if is_trainable is not None or made:
            trained = [p for one in every.values() for p in one.parameters()]
            for parameter in (*trained, *(target for target, _ in base)):
                if parameter.is_floating_point():
                    parameter.requires_grad_(is_trainable is not False)


def _widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype that holds the values of them all."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
