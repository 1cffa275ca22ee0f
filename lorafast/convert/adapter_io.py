"""``save_adapter`` and ``load_adapter``: adapters as files in PEFT's format, safetensors only."""

import itertools
import json
import os
import warnings
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lorafast.convert.adapt import freeze_base, put_in_place
from lorafast.convert.peft_format import (
    CONFIG_FILE,
    LORA_A,
    LORA_B,
    PREFIX,
    WEIGHTS_FILE,
    AdapterConfig,
    describe,
    read_config,
    stored_whole,
)
from lorafast.convert.targets import COMPILED, check_names, names_by_layer, unwrapped, why_not_here
from lorafast.nn import LoRALinear
from lorafast.nn.offload import device_of
from lorafast.nn.plain import features

_NO_MEMORY = "{} is on the device meta, which holds no values: load the model first"
# What PEFT calls the layer that an adapter wraps.
_BASE_LAYER = ".base_layer"


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "adapters are saved and loaded with safetensors: pip install safetensors"
        ) from error
    return safetensors.torch


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], modules_to_save: Sequence[str] = ()
) -> None:
    """Writes the adapters of ``model`` to ``folder`` as PEFT does: a config and a safetensors file.

    ``peft.PeftModel.from_pretrained(base_model, folder)`` reads it, and so does ``load_adapter``.

    Args:
        model: a model with ``LoRALinear`` layers, merged or not.
        folder: created if need be; an adapter that is in it is replaced.
        modules_to_save: names of other modules to store whole, such as a trained classification head.
            As in PEFT, one stands for every module whose name ends with these letters. A warning
            names trained parameters that are not stored.

    Raises:
        ValueError: there is nothing to save, a name in ``modules_to_save`` matches nothing or holds
            an adapted layer, a stored tensor is shared with a module that is not stored, or the
            layers differ in what PEFT's format has one value for. Nothing is written.
        TypeError: ``modules_to_save`` is a string.
        ImportError: safetensors is not installed.
    """
    _safetensors()
    model = unwrapped(model)
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)
    }
    if not layers:
        raise ValueError("the model has no LoRALinear: there is no adapter to save")
    if "" in layers:
        raise ValueError(
            "the model is itself a LoRALinear, and PEFT's format names layers inside a model: "
            "save its state_dict()"
        )
    if isinstance(modules_to_save, str):
        raise TypeError(
            f"modules_to_save is the string {modules_to_save!r}, expected a list of names"
        )
    modules_to_save = check_names("modules_to_save", modules_to_save)
    tensors = _whole_modules(model, modules_to_save)
    for name, layer in layers.items():
        if stored_whole(name, modules_to_save):
            raise ValueError(f"modules_to_save has {name} or what holds it, which is adapted")
        tensors[name + LORA_A] = layer.lora_A
        tensors[name + LORA_B] = layer.lora_B
    for name, tensor in tensors.items():
        if COMPILED in name.split("."):
            raise ValueError("a module inside the model is compiled: save before compiling it")
        if tensor.is_meta:
            raise ValueError(_NO_MEMORY.format(name))
    for sentence in _lost_in_the_file(model, layers, tensors):
        warnings.warn(sentence, stacklevel=2)
    _write(Path(folder), describe(layers, model, sorted(modules_to_save)), tensors)


def _lost_in_the_file(
    model: nn.Module, layers: Container[str], tensors: dict[str, Tensor]
) -> Iterator[str]:
    """What of the model's training the file can't give back, a sentence each."""
    stored = {id(tensor) for tensor in tensors.values()}
    forgotten = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in stored
    ]
    if forgotten:
        yield f"trained but not saved (name their modules in modules_to_save): {', '.join(forgotten)}"
    for names in names_by_layer(model).values():
        if names[0] in layers and len(names) > 1:
            yield f"{' and '.join(names)} are one layer, which PEFT adapts under the first name alone"


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Both files are complete before either takes its name."""
    # Copies: safetensors refuses tensors that share memory, and strides.
    copies = {
        PREFIX + key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    partial = {file: folder / f"{file}.partial" for file in (WEIGHTS_FILE, CONFIG_FILE)}
    _safetensors().save_file(copies, partial[WEIGHTS_FILE], metadata={"format": "pt"})
    partial[CONFIG_FILE].write_text(text, encoding="utf-8")
    for file, path in partial.items():
        path.replace(folder / file)


def _whole_modules(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of the modules to store whole, by their names in the model."""
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for one in names:
        if not any(name.endswith(one) for name in modules):
            raise ValueError(f"modules_to_save has {one!r}, which is the name of no module")
    state = _tensors(model)
    tensors = {name: t for name, t in state.items() if stored_whole(_owner(name), names)}
    for name, other in _shared(state):
        if name in tensors and other not in tensors:
            raise ValueError(
                f"{name} is shared with {other}, which modules_to_save leaves out: name both modules, "
                "or they part when the adapter is loaded"
            )
    return tensors


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, a shared one under each of its names."""
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _shared(state: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Each pair of names, in both orders, that stand for one tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return [pair for group in names.values() for pair in itertools.permutations(group, 2)]


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Loads an adapter in PEFT's format from ``folder`` into ``model``; returns ``model``.

    The layers that it is for may be plain ``nn.Linear``, which are adapted now (and the rest of the
    model is frozen, as ``adapt`` does), or ``LoRALinear`` of the same rank, whose values
    and scaling are replaced (their dropout stays).
    Modules stored whole (``modules_to_save``) are loaded too. Everything is checked before anything
    is changed: on an error the model is as it was.

    Raises:
        FileNotFoundError: ``folder`` has no config or no safetensors file. Pickles are never read.
        ValueError: the file doesn't fit the model; the message names the layer.
        ImportError: safetensors is not installed.
    """
    folder = Path(folder)
    inner = unwrapped(model)
    config = read_config(folder)
    tensors = _read_tensors(folder)
    adapters, others = _by_layer(tensors)
    _check_layers(inner, config, adapters)
    base = _check_others(inner, config, others, adapters)

    layers: dict[str, LoRALinear] = {}
    for linear, names in names_by_layer(inner).items():
        if not isinstance(linear, LoRALinear) and names[0] in adapters:
            layer = LoRALinear.from_linear(
                linear,
                config.rank(names[0]),
                alpha=config.alpha(names[0]),
                dropout=config.lora_dropout,
                use_rslora=config.use_rslora,
            )
            layers |= dict.fromkeys(names, layer)
    if layers:
        freeze_base(inner)
        put_in_place(inner, layers)
    with torch.no_grad():
        for target, value in base:
            target.copy_(value)
        for name, (lora_A, lora_B) in adapters.items():
            _set_adapter(inner.get_submodule(name), lora_A, lora_B, config, name)
    return model


def _set_adapter(
    layer: nn.Module, lora_A: Tensor, lora_B: Tensor, config: AdapterConfig, name: str
) -> None:
    assert isinstance(layer, LoRALinear)
    layer.set_scaling(config.alpha(name), config.use_rslora)
    layer.lora_A.copy_(lora_A)
    layer.lora_B.copy_(lora_B)
    if layer.merged:
        layer.merge()


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    safetensors = _safetensors()
    from safetensors import SafetensorError

    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickles = [
            p.name
            for p in (folder / "adapter_model.bin", folder / "adapter_model.pt")
            if p.is_file()
        ]
        hint = f"; {pickles[0]} is a pickle and is never read" if pickles else ""
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_FILE}{hint}")
    try:
        tensors: dict[str, Tensor] = safetensors.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    return tensors


def _by_layer(
    tensors: dict[str, Tensor],
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Adapter pairs by layer name, and all other tensors by their name in the model."""
    halves: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise ValueError(f"tensor {key!r} doesn't begin with {PREFIX!r}: not PEFT's format")
        name = key.removeprefix(PREFIX)
        for ending in (LORA_A, LORA_B):
            if name.endswith(ending):
                halves.setdefault(name.removesuffix(ending), {})[ending] = tensor
                break
        else:
            others[name] = tensor
    for name, pair in halves.items():
        if len(pair) != 2:
            missing = (LORA_A if LORA_B in pair else LORA_B)[1:]
            raise ValueError(f"{name} has no {missing} in the file")
    return {name: (pair[LORA_A], pair[LORA_B]) for name, pair in halves.items()}, others


def _check_layers(
    model: nn.Module, config: AdapterConfig, adapters: dict[str, tuple[Tensor, Tensor]]
) -> None:
    if not adapters:
        raise ValueError("the file has no LoRA tensors")
    modules = dict(model.named_modules(remove_duplicate=False))
    names = names_by_layer(model)
    targets = config.targets(model)
    for name, (lora_A, lora_B) in adapters.items():
        module = modules.get(name)
        if module is None:
            raise ValueError(f"the file has an adapter for {name}, which the model doesn't have")
        if not isinstance(module, LoRALinear):
            reason = why_not_here(names.get(module, [name]), module, model)
            if reason is not None:
                raise ValueError(f"{name} can't take the file's adapter: {reason}")
        if name not in targets:
            raise ValueError(f"the file has an adapter for {name}, which the config doesn't target")
        _check_pair(name, module, config, lora_A, lora_B)
    for name in sorted(targets - set(adapters)):
        raise ValueError(f"the config targets {name}, and the file has no adapter for it")
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear) and name not in adapters:
            raise ValueError(f"{name} is adapted, and the file has no adapter for it")


def _check_pair(
    name: str, module: nn.Module, config: AdapterConfig, lora_A: Tensor, lora_B: Tensor
) -> None:
    r = config.rank(name)
    if isinstance(module, LoRALinear) and module.r != r:
        raise ValueError(f"{name} is adapted with r = {module.r}, and the file has r = {r}")
    K, N = features(module)
    weight = module.lora_A if isinstance(module, LoRALinear) else module.weight
    assert isinstance(weight, Tensor)
    # Of an offloaded plain layer the adapter is made where its forward runs.
    device = weight.device if isinstance(module, LoRALinear) else device_of(module, weight)
    if device.type == "meta":
        raise ValueError(_NO_MEMORY.format(name))
    expected = {"lora_A": (r, K), "lora_B": (N, r)}
    for half, tensor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if tuple(tensor.shape) != expected[half]:
            raise ValueError(
                f"{half} of {name} has shape {list(tensor.shape)} in the file, expected "
                f"{list(expected[half])}: r is {r} in the config, the layer is "
                f"{K} → {N}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{half} of {name} is {tensor.dtype} in the file, expected floats")


def _check_others(
    model: nn.Module, config: AdapterConfig, others: dict[str, Tensor], adapters: Container[str]
) -> list[tuple[Tensor, Tensor]]:
    """Pairs (tensor of the model, its new value) for what the file has besides adapters.

    These are the modules stored whole, and base weights, which PEFT adds where an output head is
    adapted.
    """
    values = {}
    for name, tensor in others.items():
        owner, _, last = name.rpartition(".")
        if owner.endswith(_BASE_LAYER) and owner.removesuffix(_BASE_LAYER) in adapters:
            values[f"{owner.removesuffix(_BASE_LAYER)}.{last}"] = tensor
        elif stored_whole(owner, config.modules_to_save):
            values[name] = tensor
        else:
            raise ValueError(
                f"the file has {name}, which is neither lora_A nor lora_B and not part of "
                f"modules_to_save {list(config.modules_to_save)}"
            )
    state = _tensors(model)
    for name in state:
        if stored_whole(_owner(name), config.modules_to_save) and name not in values:
            raise ValueError(f"{name} is part of modules_to_save, and the file doesn't have it")
    for name, tensor in values.items():
        _check_value(name, tensor, state)
    for name, other in _shared(state):
        if name in values and not _same(values[name], values.get(other, state[other]), state[name]):
            raise ValueError(
                f"{name} is shared with {other} in the model, and in the file it is not: one tensor "
                "can't take both values"
            )
    return [(state[name], tensor) for name, tensor in values.items()]


def _check_value(name: str, tensor: Tensor, state: dict[str, Tensor]) -> None:
    if name not in state:
        raise ValueError(f"the file has {name}, which the model doesn't have")
    if state[name].shape != tensor.shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)} in the file, expected {list(state[name].shape)}"
        )
    if state[name].is_meta:
        raise ValueError(_NO_MEMORY.format(name))
    if state[name].is_floating_point() != tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype} in the file, expected {state[name].dtype}")


def _same(one: Tensor, other: Tensor, like: Tensor) -> bool:
    return torch.equal(one.to(like), other.to(like))
