"""Houlsby's adapters of BERT and RoBERTa in the layout of AdapterHub's ``adapters``, read and written.

That is its ``DoubleSeqBnConfig``, in ``adapter_config.json`` and ``adapter.safetensors``
(``save_adapter(..., use_safetensors=True)``; the pickle that it writes otherwise is never read). Others
of its configurations compute what no adapter here does: ``SeqBnConfig`` reads what LayerNorm makes of
the residual sum, ``ParBnConfig`` the input of a feed-forward that is no module of its own.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafast.convert.adapter_pair import safetensors
from lorafast.convert.bottleneck_io import (
    BottleneckConfig,
    Place,
    check_places,
    is_finite,
    put_into,
)
from lorafast.convert.bottlenecks import bottlenecks
from lorafast.convert.targets import unwrapped
from lorafast.core.dtypes import FLOATS
from lorafast.core.files import write_whole

CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
_PICKLE = "pytorch_adapter.bin"
_FAMILIES = ("bert", "roberta")
_ATTENTION, _OUTPUT = ".attention.output", ".output"
_PLACE = ".dropout"
"""What of these modules makes the output that is added to the residual stream."""
_ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu",
    "tanh": "tanh",
}  # fmt: skip
_PARAMETERS = {
    "adapter_down.0.weight": "down", "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up", "adapter_up.bias": "up_bias",
}  # fmt: skip
_HOULSBY: dict[str, Any] = {
    "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "inv_adapter": None,
    "is_parallel": False, "ln_after": False, "ln_before": False, "original_ln_after": True,
    "original_ln_before": False, "phm_layer": False, "residual_before_ln": True,
    "stochastic_depth": 0.0, "use_gating": False,
}  # fmt: skip
"""What decides what is computed, with the values of ``DoubleSeqBnConfig``."""
_DESCRIPTIVE: dict[str, Any] = {
    "factorized_phm_W": True, "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert", "init_weights_seed": None,
    "inv_adapter_reduction_factor": None, "learn_phm": True, "leave_out": [], "mh_adapter": True,
    "output_adapter": True, "phm_bias": True, "phm_c_init": "normal", "phm_dim": 4,
    "phm_init_range": 0.0001, "phm_rank": 1, "reduction_factor": 16, "shared_W_phm": False,
    "shared_phm_rule": True,
}  # fmt: skip
"""What says how it begins, and where, which the tensors say too; with those values."""


def load_adapterhub(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Loads a Houlsby adapter that AdapterHub's ``adapters`` saved; returns ``model``.

    The model becomes as ``adapt(model, kind="houlsby")`` leaves it. On an error it is as it was.

    Raises:
        FileNotFoundError: ``folder`` lacks a file.
        ValueError: the model is no BERT or RoBERTa, or the files hold something else; the message says
            what.
        ImportError: safetensors is not installed.
    """
    inner = unwrapped(model)
    config_of = _check_family(inner)
    name, activation, scaling, where = _read_config(Path(folder) / CONFIG)
    by_place = _places(inner, name, _read_tensors(Path(folder)))
    _check_complete(inner, by_place, where)
    places = {}
    for place, tensors in by_place.items():
        for parameter in _PARAMETERS.values():
            if parameter not in tensors:
                raise ValueError(f"the file has no {parameter} of the adapter at {place}")
        down = tensors["down"]
        if down.dim() != 2 or 0 in down.shape:
            raise ValueError(
                f"the down projection at {place} has shape {list(down.shape)} in the file, expected "
                "[b, hidden_size]"
            )
        b, K = down.shape
        if config_of.hidden_size != K:
            raise ValueError(
                f"the adapter at {place} is for a hidden size of {K}, the model's is "
                f"{config_of.hidden_size}"
            )
        places[place] = Place(K, b, K, activation, scaling, False, False)
        for parameter, shape in places[place].shapes().items():
            tensor = tensors[parameter]
            if tuple(tensor.shape) != shape or tensor.dtype not in FLOATS:
                raise ValueError(
                    f"{parameter} at {place} is {tensor.dtype} of shape {list(tensor.shape)} in the "
                    f"file, expected floats of shape {list(shape)}"
                )
    config = BottleneckConfig(places, ())
    check_places(inner, config)
    put_into(inner, config, by_place, [], None)
    return model


def save_adapterhub(
    model: nn.Module, folder: str | os.PathLike[str], name: str = "lorafast"
) -> None:
    """Writes the bottleneck adapters of a BERT or RoBERTa so that ``adapters`` loads them:
    ``model.load_adapter(folder, use_safetensors=True)``.

    Args:
        model: adapted with ``kind="houlsby"`` where none of ``targets`` was given, or a part of these
            places.
        folder: created if need be.
        name: of the adapter, a word.

    Raises:
        ValueError: the model is another, or its adapters are none that this layout has. Nothing is
            written.
        OSError: a file can't be written.
        ImportError: safetensors is not installed.
    """
    inner = unwrapped(model)
    config_of = _check_family(inner)
    if not name.isidentifier():
        raise ValueError(f"name is {name!r}, expected a word")
    found = bottlenecks(inner)
    if not found:
        raise ValueError("the model has no bottleneck adapter: there is none to save")
    kinds = {_kind_of(place) for place in found}
    alike = {(one.bottleneck, one.activation, one.scaling) for one in found.values()}
    if None in kinds:
        place = next(place for place in found if _kind_of(place) is None)
        raise ValueError(f"{place} has a bottleneck, and AdapterHub's layout has none there")
    if any(one.parallel or one.norm is not None for one in found.values()):
        raise ValueError("a bottleneck is parallel or has a LayerNorm, which this layout has not")
    if len(alike) > 1:
        raise ValueError("bottlenecks differ in width, activation or scaling, expected one of each")
    b, activation, scaling = alike.pop()
    with_them, layers = _layers(inner, found)
    if len(found) != len(with_them) * len(kinds):
        raise ValueError(
            "a layer has one bottleneck where another has two, expected as many in each"
        )
    K = config_of.hidden_size
    of_hub = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    config = {
        "config": _HOULSBY
        | _DESCRIPTIVE
        | {
            "leave_out": sorted(layers - with_them), "mh_adapter": _ATTENTION in kinds,
            "output_adapter": _OUTPUT in kinds, "reduction_factor": _factor(K, b), "scaling": scaling,
            "non_linearity": of_hub[activation],
        },
        "hidden_size": K, "model_class": type(inner).__name__,
        "model_name": config_of.name_or_path, "model_type": config_of.model_type,
        "name": name, "version": "lorafast",
    }  # fmt: skip
    tensors = {
        f"{place.removesuffix(_PLACE)}.adapters.{name}.{theirs}": getattr(one, ours)
        .detach()
        .cpu()
        .clone()
        .contiguous()
        for place, one in found.items()
        for theirs, ours in _PARAMETERS.items()
    }
    content = safetensors().save(tensors, metadata={"format": "pt"})
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_whole(Path(folder) / WEIGHTS, content)
    write_whole(Path(folder) / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())


def _factor(K: int, b: int) -> float:
    """A ``reduction_factor`` of which ``int(K // reduction_factor)`` is b."""
    exact = K / b
    return exact if int(K // exact) == b else K / (b + 0.5)


def _check_family(model: nn.Module) -> Any:
    """The model's config."""
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in _FAMILIES:
        raise ValueError(
            f"the model is a {type(model).__name__}, and AdapterHub's layout is known of "
            f"{' and '.join(_FAMILIES)} alone"
        )
    return getattr(model, "config", None)


def _kind_of(place: str) -> str | None:
    if not re.search(r"(?:^|\.)layer\.\d+\.(attention\.)?output\.dropout$", place):
        return None
    return _ATTENTION if place.endswith(_ATTENTION + _PLACE) else _OUTPUT


def _layer_of(place: str) -> int:
    return int(re.findall(r"(?:^|\.)layer\.(\d+)\.", place)[-1])


def _layers(model: nn.Module, found: dict[str, Any]) -> tuple[set[int], set[int]]:
    """The numbers of the layers that have a bottleneck, and those of all."""

    def numbers(names: Any) -> set[int]:
        places = (name for name in names if _kind_of(name) is not None)
        return {_layer_of(place) for place in places}

    return numbers(found), numbers(name for name, _ in model.named_modules())


@dataclass(frozen=True)
class _Where:
    """Where the config says that adapters are."""

    kinds: set[str]
    leave_out: set[int]


def _where(fields: dict[str, Any], path: Path) -> _Where:
    kinds = set()
    for field, kind in (("mh_adapter", _ATTENTION), ("output_adapter", _OUTPUT)):
        given = fields.get(field, True)
        if not isinstance(given, bool):
            raise ValueError(f"{field} is {given!r} in {path}, expected true or false")
        kinds |= {kind} if given else set()
    leave_out = fields.get("leave_out", [])
    if not isinstance(leave_out, list) or not all(type(one) is int for one in leave_out):
        raise ValueError(
            f"leave_out is {leave_out!r} in {path}, expected a list of layers' numbers"
        )
    return _Where(kinds, set(leave_out))


def _check_complete(model: nn.Module, found: dict[str, Any], where: _Where) -> None:
    """Raises ``ValueError`` unless the file has the adapters that its config names, and no other."""
    for place in (name for name, _ in model.named_modules() if _kind_of(name) is not None):
        layer = _layer_of(place)
        expected = _kind_of(place) in where.kinds and layer not in where.leave_out
        if expected != (place in found):
            one = "no" if expected else "an"
            raise ValueError(
                f"the file has {one} adapter at {place.removesuffix(_PLACE)}, unlike what its config "
                "says (mh_adapter, output_adapter, leave_out)"
            )


def _read_config(path: Path) -> tuple[str, str, float, _Where]:
    """The adapter's name, its activation, its scaling and its places."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON that can be read: {error}") from error
    fields = raw.get("config") if isinstance(raw, dict) else None
    name = raw.get("name") if isinstance(raw, dict) else None
    if not isinstance(fields, dict) or not isinstance(name, str):
        raise ValueError(f"{path} is no config of AdapterHub's: it lacks a config or a name")
    for field, value in _HOULSBY.items():
        if field not in fields or type(fields[field]) not in (type(value), int):
            raise ValueError(f"{field} is {fields.get(field)!r} in {path}, expected {value!r}")
        if fields[field] != value:
            raise ValueError(
                f"{field} is {fields[field]!r} in {path}, expected {value!r}: Houlsby's adapters "
                "(DoubleSeqBnConfig) are the ones that are read"
            )
    for field in fields:
        if field not in (*_HOULSBY, *_DESCRIPTIVE, "scaling", "non_linearity", "architecture"):
            raise ValueError(f"{path} has the unknown field {field!r}")
    activation: Any = fields.get("non_linearity")
    scaling: Any = fields.get("scaling")
    if not isinstance(activation, str) or activation.lower() not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ValueError(f"non_linearity is {activation!r} in {path}, expected one of {known}")
    if not is_finite(scaling):
        raise ValueError(f"scaling is {scaling!r} in {path}, expected a finite number")
    return name, _ACTIVATIONS[activation.lower()], float(scaling), _where(fields, path)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    load_file = safetensors().load_file
    path = folder / WEIGHTS
    if not path.is_file():
        pickle = f"; {_PICKLE} is a pickle and is never read: save with use_safetensors=True"
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS}{pickle if (folder / _PICKLE).is_file() else ''}"
        )
    from safetensors import SafetensorError

    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    return tensors


def _places(
    model: nn.Module, name: str, tensors: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The parameters of each bottleneck, by the places that the model has."""
    modules = [place for place, _ in model.named_modules() if _kind_of(place) is not None]
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, _, parameter = key.partition(f".adapters.{name}.")
        if parameter not in _PARAMETERS:
            raise ValueError(f"the file has {key}, which is no part of a Houlsby adapter {name!r}")
        # Saved from a model with a head, the names begin with that of the model in it.
        wanted = owner + _PLACE
        there = [p for p in modules if p == wanted or p.endswith(f".{wanted}")]
        if not there:
            there = [p for p in modules if wanted.endswith(f".{p}")]
        if len(there) != 1:
            raise ValueError(f"the file has an adapter at {owner}, which the model doesn't have")
        of_place = found.setdefault(there[0], {})
        if _PARAMETERS[parameter] in of_place:
            raise ValueError(f"the file has {key} twice, under names that reach the same layer")
        of_place[_PARAMETERS[parameter]] = tensor
    if not found:
        raise ValueError("the file has no tensors")
    return found
