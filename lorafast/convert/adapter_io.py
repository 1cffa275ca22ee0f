"""``save_adapter`` and ``load_adapter``: adapters as files in PEFT's format, safetensors only."""

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

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
)
from lorafast.convert.targets import matches, why_not_here
from lorafast.nn import LoRALinear

# torch.compile puts its wrapper's name into every name below it.
_COMPILED = "_orig_mod."


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "adapters are saved and loaded with safetensors: pip install 'lorafast[safetensors]'"
        ) from error
    return safetensors.torch


def _uncompiled(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], modules_to_save: Sequence[str] = ()
) -> None:
    """Writes the adapters of ``model`` to ``folder`` as PEFT does: a config and a safetensors file.

    ``peft.PeftModel.from_pretrained(base_model, folder)`` reads it, and so does ``load_adapter``.

    Args:
        model: a model with ``LoRALinear`` layers, merged or not.
        folder: created if need be; an adapter that is in it is replaced.
        modules_to_save: names (or endings of names) of other modules to store whole, such as a
            trained classification head. A warning names trained parameters that are not stored.

    Raises:
        ValueError: there is nothing to save, a name in ``modules_to_save`` matches nothing, or the
            layers differ in what PEFT's format has one value for.
        ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    model = _uncompiled(model)
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
    if any(_COMPILED in name for name in layers):
        raise ValueError("a module inside the model is compiled: save before compiling it")
    whole = _named_modules(model, modules_to_save)
    tensors = {}
    for name, layer in layers.items():
        tensors[PREFIX + name + LORA_A] = layer.lora_A
        tensors[PREFIX + name + LORA_B] = layer.lora_B
    stored = {id(tensor) for tensor in tensors.values()}
    for name, module in whole.items():
        tensors |= {f"{PREFIX}{name}.{key}": t for key, t in module.state_dict().items()}
        stored |= {id(parameter) for parameter in module.parameters()}
    forgotten = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in stored
    ]
    if forgotten:
        warnings.warn(
            f"trained but not saved (name their modules in modules_to_save): {', '.join(forgotten)}",
            stacklevel=2,
        )
    config = describe(layers, model, sorted(modules_to_save))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Copies: safetensors refuses tensors that share memory, and strides.
    copies = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
    partial = folder / f"{WEIGHTS_FILE}.partial"
    safetensors.save_file(copies, partial, metadata={"format": "pt"})
    partial.replace(folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def _named_modules(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    if isinstance(names, str):
        raise TypeError(f"modules_to_save is the string {names!r}, expected a list of names")
    found: dict[str, nn.Module] = {}
    for name in names:
        hits = {n: m for n, m in model.named_modules() if n and matches((name,), n)}
        if not hits:
            raise ValueError(f"modules_to_save has {name!r}, which is the name of no module")
        found |= hits
    return found


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Loads an adapter in PEFT's format from ``folder`` into ``model``; returns ``model``.

    The layers that it is for may be plain ``nn.Linear``, which are adapted now (and the rest of the
    model is frozen, as ``adapt`` does), or ``LoRALinear`` of the same rank, whose values are replaced.
    Modules stored whole (``modules_to_save``) are loaded too. Everything is checked before anything
    is changed: on an error the model is as it was.

    Raises:
        FileNotFoundError: ``folder`` has no config or no safetensors file. Pickles are never read.
        ValueError: the file doesn't fit the model; the message names the layer.
        ImportError: safetensors is not installed.
    """
    folder = Path(folder)
    inner = _uncompiled(model)
    config = read_config(folder)
    tensors = _read_tensors(folder)
    adapters, others = _by_layer(tensors)
    _check_layers(inner, config, adapters)
    whole = _check_whole(inner, config, others)

    named = list(inner.named_modules(remove_duplicate=False))
    layers: dict[str, LoRALinear] = {}
    for name, (lora_A, lora_B) in adapters.items():
        module = inner.get_submodule(name)
        if isinstance(module, nn.Linear):
            layer = LoRALinear.from_linear(
                module,
                config.rank(name),
                alpha=config.alpha(name),
                dropout=config.lora_dropout,
                use_rslora=config.use_rslora,
            )
            # A layer that has two names stays one layer.
            layers |= {n: layer for n, m in named if m is module}
        else:
            assert isinstance(module, LoRALinear)
            layer = module
            layer.set_scaling(config.alpha(name), config.use_rslora)
        with torch.no_grad():
            layer.lora_A.copy_(lora_A)
            layer.lora_B.copy_(lora_B)
        if layer.merged:
            layer.merge()
    if layers:
        freeze_base(inner)
        put_in_place(inner, layers)
    with torch.no_grad():
        for target, tensor in whole:
            target.copy_(tensor)
    return model


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
    for name, (lora_A, lora_B) in adapters.items():
        module = modules.get(name)
        if module is None:
            raise ValueError(f"the file has an adapter for {name}, which the model doesn't have")
        if not isinstance(module, LoRALinear):
            reason = why_not_here(name, module, model)
            if reason is not None:
                raise ValueError(f"{name} can't take the file's adapter: {reason}")
        _check_pair(name, module, config, lora_A, lora_B)
    for name in sorted(config.targets(model) - set(adapters)):
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
    assert isinstance(module, (nn.Linear, LoRALinear))
    expected = {"lora_A": (r, module.in_features), "lora_B": (module.out_features, r)}
    for half, tensor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if tuple(tensor.shape) != expected[half]:
            raise ValueError(
                f"{half} of {name} has shape {list(tensor.shape)} in the file, expected "
                f"{list(expected[half])}: r is {r} in the config, the layer is "
                f"{module.in_features} → {module.out_features}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{half} of {name} is {tensor.dtype} in the file, expected floats")


def _check_whole(
    model: nn.Module, config: AdapterConfig, others: dict[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Pairs (tensor of the model, its new value) for the modules that were stored whole."""
    state = model.state_dict(keep_vars=True)
    pairs = []
    for name, tensor in others.items():
        module = name.rpartition(".")[0]
        if not _inside(module, config.modules_to_save):
            raise ValueError(
                f"the file has {name}, which is neither lora_A nor lora_B and not part of "
                f"modules_to_save {config.modules_to_save}"
            )
        if name not in state:
            raise ValueError(f"the file has {name}, which the model doesn't have")
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)} in the file, expected "
                f"{list(state[name].shape)}"
            )
        pairs.append((state[name], tensor))
    return pairs


def _inside(module: str, names: list[str]) -> bool:
    """Whether ``module`` or one that holds it is among ``names``."""
    parts = module.split(".")
    return any(matches(names, ".".join(parts[:i])) for i in range(1, len(parts) + 1))
