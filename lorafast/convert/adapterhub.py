"""Bottleneck adapters of BERT, RoBERTa, Llama and Mistral in the layout of AdapterHub's ``adapters``.

Those are its ``DoubleSeqBnConfig`` (Houlsby), ``SeqBnConfig`` (Pfeiffer) and ``ParBnConfig`` (parallel),
in ``adapter_config.json`` and ``adapter.safetensors`` (``save_adapter(..., use_safetensors=True)``; the
pickle that it writes otherwise is never read). ``adapterhub_config`` says what each computes.
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
from lorafast.convert.adapterhub_config import (
    AFTER_NORM,
    ATTENTION,
    NORMED,
    OUTPUT,
    PARALLEL,
    SEQUENTIAL,
    HubConfig,
    config_fields,
    read_config,
)
from lorafast.convert.bottleneck_io import BottleneckConfig, Place, check_places, put_into
from lorafast.convert.bottlenecks import bottlenecks
from lorafast.convert.targets import unwrapped
from lorafast.core.dtypes import FLOATS
from lorafast.core.files import write_whole

CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
_PICKLE = "pytorch_adapter.bin"
_PARAMETERS = {
    "adapter_down.0.weight": "down", "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up", "adapter_up.bias": "up_bias",
}  # fmt: skip


@dataclass(frozen=True)
class _Family:
    """Where the blocks of a model are, and where in a block adapters are, by their kind."""

    blocks: str
    """The list that holds them."""
    owners: dict[str, str]
    """What has the adapters in AdapterHub's model."""
    places: dict[str, dict[str, str]]
    """By what is computed, the modules at which they stand here; the block itself is "". """
    stands: dict[str, str]
    """And where at these, if not at their outputs."""


_BERT = _Family(
    blocks="layer",
    owners={ATTENTION: "attention.output", OUTPUT: "output"},
    places={
        SEQUENTIAL: {ATTENTION: "attention.output.dropout", OUTPUT: "output.dropout"},
        NORMED: {ATTENTION: "attention.output.LayerNorm", OUTPUT: "output.LayerNorm"},
        AFTER_NORM: {ATTENTION: "attention.output.LayerNorm", OUTPUT: "output.LayerNorm"},
        PARALLEL: {ATTENTION: "attention.output", OUTPUT: "output"},
    },
    stands={NORMED: "norm", PARALLEL: "residual"},
)
_LLAMA = _Family(
    blocks="layers",
    owners={ATTENTION: "attention_adapters", OUTPUT: "output_adapters"},
    places={
        SEQUENTIAL: {ATTENTION: "self_attn", OUTPUT: "mlp"},
        # Without a norm both are o + t + B(o + t), which after attention is no module's output.
        NORMED: {OUTPUT: ""},
        AFTER_NORM: {OUTPUT: ""},
    },
    stands={},
)
_FAMILIES = {"bert": _BERT, "roberta": _BERT, "llama": _LLAMA, "mistral": _LLAMA}


def load_adapterhub(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Loads bottleneck adapters that AdapterHub's ``adapters`` saved; returns ``model``.

    The model is frozen and has them in place as ``adapt`` leaves it. On an error it is as it was.

    Raises:
        FileNotFoundError: ``folder`` lacks a file.
        ValueError: the model is of another family, or the files hold something else; the message says
            what.
        ImportError: safetensors is not installed.
    """
    inner = unwrapped(model)
    config_of, family = _check_family(inner)
    config = read_config(Path(folder) / CONFIG)
    _check_model(inner, family, config)
    by_place = _places(inner, family, config, _read_tensors(Path(folder)))
    _check_complete(inner, family, by_place, config)
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
        stands = family.stands.get(config.flow, "output")
        places[place] = Place(K, b, K, config.activation, config.scaling, False, False, stands)
        for parameter, shape in places[place].shapes().items():
            tensor = tensors[parameter]
            if tuple(tensor.shape) != shape or tensor.dtype not in FLOATS:
                raise ValueError(
                    f"{parameter} at {place} is {tensor.dtype} of shape {list(tensor.shape)} in the "
                    f"file, expected floats of shape {list(shape)}"
                )
    own = BottleneckConfig(places, ())
    check_places(inner, own)
    put_into(inner, own, by_place, [], None)
    return model


def save_adapterhub(
    model: nn.Module, folder: str | os.PathLike[str], name: str = "lorafast"
) -> None:
    """Writes the bottleneck adapters of a model so that ``adapters`` loads them:
    ``model.load_adapter(folder, use_safetensors=True)``.

    Args:
        model: adapted with ``kind="houlsby"`` or ``"pfeiffer"`` where none of ``targets`` was given (of
            which ``adapters`` has the latter as a ``DoubleSeqBnConfig(mh_adapter=False)``), a part of
            these places, or what ``load_adapterhub`` made.
        folder: created if need be.
        name: of the adapter, a word.

    Raises:
        ValueError: the model is another, or its adapters are none that this layout has. Nothing is
            written.
        OSError: a file can't be written.
        ImportError: safetensors is not installed.
    """
    inner = unwrapped(model)
    config_of, family = _check_family(inner)
    if not name.isidentifier():
        raise ValueError(f"name is {name!r}, expected a word")
    found = bottlenecks(inner)
    if not found:
        raise ValueError("the model has no bottleneck adapter: there is none to save")
    if any(one.parallel or one.norm is not None for one in found.values()):
        raise ValueError("a bottleneck is parallel or has a LayerNorm, which this layout has not")
    flow, at = _flow(inner, family, found)
    alike = {(one.bottleneck, one.activation, one.scaling) for one in found.values()}
    if len(alike) > 1:
        raise ValueError("bottlenecks differ in width, activation or scaling, expected one of each")
    b, activation, scaling = alike.pop()
    kinds = {kind for _, kind in at.values()}
    with_them, numbers = {block for block, _ in at.values()}, _blocks(inner, family)
    if len(found) != len(with_them) * len(kinds):
        raise ValueError(
            "a layer has one bottleneck where another has two, expected as many in each"
        )
    K = config_of.hidden_size
    left_out = {number for block, number in numbers.items() if block not in with_them}
    config = {
        "config": config_fields(flow, activation, scaling, b, K, kinds, left_out),
        "hidden_size": K, "model_class": type(inner).__name__,
        "model_name": config_of.name_or_path, "model_type": config_of.model_type,
        "name": name, "version": "lorafast",
    }  # fmt: skip
    tensors = {
        f"{_joined(at[place][0], family.owners[at[place][1]])}.adapters.{name}.{theirs}": getattr(
            one, ours
        )
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


def _check_family(model: nn.Module) -> tuple[Any, _Family]:
    """The model's config, and where its adapters are."""
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in _FAMILIES:
        raise ValueError(
            f"the model is a {type(model).__name__}, and AdapterHub's layout is known of "
            f"{', '.join(_FAMILIES)} alone"
        )
    return getattr(model, "config", None), _FAMILIES[family]


def _check_model(model: Any, family: _Family, config: HubConfig) -> None:
    """Raises ``ValueError`` if the config is of an adapter of another model than this."""
    own = model.config.model_type
    if config.model_type not in (None, own):
        raise ValueError(
            f"the adapter was trained in a {config.model_type!r}, its model_type, and the model is a "
            f"{own!r}: of another family the same layers compute something else"
        )
    numbers = set(_blocks(model, family).values())
    unknown = sorted(config.leave_out - numbers)
    if unknown:
        raise ValueError(
            f"leave_out has {', '.join(map(str, unknown))} in the config, and the model has "
            f"{len(numbers)} layers: the adapter is for another"
        )


def _joined(*names: str) -> str:
    return ".".join(name for name in names if name)


def _blocks(model: nn.Module, family: _Family) -> dict[str, int]:
    """The names of the blocks that could have adapters, and their numbers."""
    modules = dict(model.named_modules())
    ends = family.places[SEQUENTIAL].values()
    return {
        name: int(name.rpartition(".")[2])
        for name in modules
        if re.search(rf"(?:^|\.){family.blocks}\.\d+$", name)
        and all(_joined(name, end) in modules for end in ends)
    }


def _flow(
    model: nn.Module, family: _Family, found: dict[str, Any]
) -> tuple[str, dict[str, tuple[str, str]]]:
    """What the bottlenecks compute, and of each its block and its kind."""
    blocks = _blocks(model, family)
    at: dict[str, tuple[str, str]] = {}
    for flow, places in family.places.items():
        there = {_joined(b, place): (b, kind) for b in blocks for kind, place in places.items()}
        stands = family.stands.get(flow, "output")
        of_flow = {
            place: there[place]
            for place, one in found.items()
            if place in there and one.stands == stands
        }
        if len(of_flow) == len(found):
            return flow, of_flow
        at |= of_flow
    place = next((place for place in found if place not in at), None)
    if place is not None:
        raise ValueError(f"{place} has a bottleneck, and AdapterHub's layout has none there")
    raise ValueError(
        "bottlenecks stand at modules of different kinds, expected all as one of AdapterHub's "
        "configurations has them"
    )


def _check_complete(
    model: nn.Module, family: _Family, found: dict[str, Any], config: HubConfig
) -> None:
    """Raises ``ValueError`` unless the file has the adapters that its config names, and no other."""
    places = family.places[config.flow]
    for block, number in _blocks(model, family).items():
        for kind, place in places.items():
            expected = kind in config.kinds and number not in config.leave_out
            if expected != (_joined(block, place) in found):
                one = "no" if expected else "an"
                raise ValueError(
                    f"the file has {one} adapter at {_joined(block, family.owners[kind])}, unlike what "
                    "its config says (mh_adapter, output_adapter, leave_out)"
                )


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
    model: nn.Module, family: _Family, config: HubConfig, tensors: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The parameters of each bottleneck, by the places that the model has."""
    if config.flow not in family.places:
        raise ValueError(
            "is_parallel is true in the config, and such an adapter reads the residual stream, which "
            "no module of this model gets beside what is added to it"
        )
    blocks, places = _blocks(model, family), family.places[config.flow]
    kinds = {owner: kind for kind, owner in family.owners.items()}
    lone = [kind for kind in config.kinds if kind not in places]
    if lone:
        raise ValueError(
            f"{lone[0]} and original_ln_before are true in the config, and in this model no module "
            "gives the sum that such an adapter reads"
        )
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, _, parameter = key.partition(f".adapters.{config.name}.")
        if parameter not in _PARAMETERS:
            raise ValueError(
                f"the file has {key}, which is no part of a bottleneck adapter {config.name!r}"
            )
        split = re.fullmatch(rf"((?:.*\.)?{family.blocks}\.\d+)\.({'|'.join(kinds)})", owner)
        wanted, kind = (split[1], kinds[split[2]]) if split else ("", "")
        # Saved from a model with a head, the names begin with that of the model in it.
        there = [block for block in blocks if block == wanted or block.endswith(f".{wanted}")]
        if not there:
            there = [block for block in blocks if wanted.endswith(f".{block}")]
        if len(there) != 1 or kind not in places:
            raise ValueError(f"the file has an adapter at {owner}, which the model doesn't have")
        of_place = found.setdefault(_joined(there[0], places[kind]), {})
        if _PARAMETERS[parameter] in of_place:
            raise ValueError(f"the file has {key} twice, under names that reach the same layer")
        of_place[_PARAMETERS[parameter]] = tensor
    if not found:
        raise ValueError("the file has no tensors")
    return found
