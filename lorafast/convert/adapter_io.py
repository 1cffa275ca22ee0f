"""``save_adapter`` and ``load_adapter``: adapters as files in PEFT's format, safetensors only."""

import itertools
import os
import warnings
from collections.abc import Collection, Container, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lorafast.convert import bottleneck_io
from lorafast.convert.adapter import Adapter
from lorafast.convert.adapter_pair import check_folder, read_pair, safetensors, write_pair
from lorafast.convert.bottlenecks import bottlenecks
from lorafast.convert.exchange import put_into, whole, why_not_replaceable
from lorafast.convert.fsdp import name_of_sharded
from lorafast.convert.kinds import PEFT_NAMES, adapted_layers, kind_of_layer
from lorafast.convert.named import adapter_names, add_to_each, delete_adapter, showing
from lorafast.convert.peft_format import (
    PREFIX,
    AdapterConfig,
    describe,
    parse_config,
    stored_whole,
)
from lorafast.convert.places import embeddings_of
from lorafast.convert.targets import (
    COMPILED,
    check_names,
    check_without_peft,
    names_by_layer,
    unwrapped,
    why_not_here,
)
from lorafast.nn import AdapterLayer, inactive
from lorafast.nn.offload import device_of
from lorafast.ops.checks import FLOATS

_NO_MEMORY = "{} is on the device meta, which holds no values: load the model first"
# What PEFT calls the layer that an adapter wraps.
_BASE_LAYER = ".base_layer"
# What the first release of FSDP calls the module that it wraps.
_FSDP = "_fsdp_wrapped_module"


def save_adapter(
    model: nn.Module | Adapter,
    folder: str | os.PathLike[str],
    modules_to_save: Sequence[str] = (),
    *,
    adapter: str | None = None,
    kind: Literal["lora", "bottleneck"] | None = None,
) -> None:
    """Writes the adapters of ``model`` to ``folder`` as PEFT does: a config and a safetensors file.

    ``peft.PeftModel.from_pretrained(base_model, folder)`` reads it, and so does ``load_adapter``, which
    alone reads bottleneck adapters: of these PEFT has none (``lorafast.convert.bottleneck_io`` has the
    format).

    A save that is killed, or a full disk, leaves nothing that ``load_adapter`` takes for an adapter, and
    several processes may save to one folder: one of their adapters stays. Of a model that is sharded
    (FSDP2, tensor parallelism) every rank must call this: the tensors are gathered, and the first
    rank of the mesh writes. The others return before the files are there: call
    ``torch.distributed.barrier()`` before they read.

    Args:
        model: a model with adapted layers, merged or not; or an ``Adapter``, which is written as it is.
        folder: created if need be; an adapter that is in it is replaced.
        modules_to_save: names of other modules to store whole, such as a trained classification head.
            As in PEFT, one stands for every module whose name ends with these letters. A warning
            names trained parameters that are not stored.
        adapter: which of several adapters (``add_adapter``); None is the active one. Another one takes
            the active one's place in the model meanwhile: nothing else may use the model.
        kind: which adapters, where the model has both LoRA's and bottlenecks: a folder holds one kind.

    Raises:
        ValueError: there is nothing to save, a name in ``modules_to_save`` matches nothing or holds
            an adapted layer, a stored tensor is shared with a module that is not stored, the
            layers differ in what PEFT's format has one value for, or a tensor is a mere shard that
            can't be gathered here, or the model has no such ``adapter``. Nothing is written.
        OSError: ``folder`` can't be written.
        TypeError: ``modules_to_save`` is a string.
        ImportError: safetensors is not installed.
    """
    if isinstance(model, Adapter):
        if modules_to_save or adapter is not None or kind is not None:
            raise ValueError(
                "modules_to_save, adapter and kind are for a model, and this is an Adapter"
            )
        model.save(folder)
        return
    with showing(model, adapter):
        forgotten, lost = write_adapter(model, Path(folder), modules_to_save, kind)
    for sentence in (*forgotten, *lost):
        warnings.warn(sentence, stacklevel=2)


def write_adapter(
    model: nn.Module,
    folder: Path,
    modules_to_save: Sequence[str] = (),
    kind: Literal["lora", "bottleneck"] | None = None,
) -> tuple[list[str], list[str]]:
    """As ``save_adapter``; what the files can't give back of the model's training, a sentence each.

    First what is trained besides the adapters and not in the files, then what of the adapters.
    """
    safetensors()
    check_folder(folder)
    model = unwrapped(model)
    layers = adapted_layers(model)
    of_bottlenecks = bottleneck_io.tensors_of(model)
    elsewhere: dict[str, Tensor] = {}  # which another folder is for
    if kind not in (None, "lora", "bottleneck"):
        raise ValueError(f"kind is {kind!r}, expected 'lora', 'bottleneck' or None")
    if kind == "lora":
        elsewhere, of_bottlenecks = of_bottlenecks, {}
    elif kind == "bottleneck":
        elsewhere = {
            f"{name}.{parameter}": tensor
            for name, layer in layers.items()
            for parameter, tensor in layer.adapter_parameters().items()
        }
        layers = {}
    if of_bottlenecks and layers:
        raise ValueError(
            f"{next(iter(layers))} has a LoRA adapter and {next(iter(bottlenecks(model)))} a "
            "bottleneck: a folder holds adapters of one kind, say which by kind"
        )
    if not layers and not of_bottlenecks:
        what = f"adapter of the kind {kind!r}" if kind else "adapted layer"
        raise ValueError(f"the model has no {what}: there is no adapter to save")
    if "" in layers:
        raise ValueError(
            f"the model is itself a {type(layers['']).__name__}, and PEFT's format names layers inside "
            "a model: save its state_dict()"
        )
    if isinstance(modules_to_save, str):
        raise TypeError(
            f"modules_to_save is the string {modules_to_save!r}, expected a list of names"
        )
    modules_to_save = check_names("modules_to_save", modules_to_save)
    tensors = _whole_modules(model, modules_to_save)
    for name in bottlenecks(model):
        if stored_whole(name, modules_to_save):
            raise ValueError(f"modules_to_save has {name} or what holds it, which has a bottleneck")
    tensors |= of_bottlenecks
    for name, layer in layers.items():
        if stored_whole(name, modules_to_save):
            raise ValueError(f"modules_to_save has {name} or what holds it, which is adapted")
        for parameter, tensor in layer.adapter_parameters().items():
            tensors[f"{name}.{layer.peft_names[parameter]}"] = tensor
    for name, tensor in tensors.items():
        if COMPILED in name.split("."):
            raise ValueError("a module inside the model is compiled: save before compiling it")
        if _FSDP in name.split("."):
            raise ValueError(
                "the model is in FullyShardedDataParallel, whose parameters are flat: save inside "
                "summon_full_params and give the model that it wraps, or use fully_shard"
            )
        if tensor.is_meta:
            raise ValueError(_NO_MEMORY.format(name))
    for name, layer in layers.items():
        _check_factors(name, layer)
    prefix = "" if of_bottlenecks else PREFIX
    if of_bottlenecks:
        config = bottleneck_io.describe(model, modules_to_save)
    else:
        config = describe(layers, model, sorted(modules_to_save))
    forgotten = list(_trained_besides(model, tensors | elsewhere))
    lost = list(_lost_in_the_file(model, layers))
    writes = True
    # Copies: safetensors refuses tensors that share memory, and strides.
    copies = {}
    for name, tensor in tensors.items():
        gathered, first = whole(tensor)
        writes = writes and first
        copies[prefix + name] = gathered.detach().cpu().clone().contiguous()
    if writes:
        write_pair(folder, config, copies)
    return forgotten, lost


def _check_factors(name: str, layer: AdapterLayer) -> None:
    parameters = layer.adapter_parameters()
    for parameter, shape in layer.adapter_shapes().items():
        found = tuple(parameters[parameter].shape)
        if found != shape:
            raise ValueError(
                f"{parameter} of {name} has shape {list(found)}, expected {list(shape)}: gather its "
                "shards first (DeepSpeed's GatheredParameters)"
            )


def _trained_besides(model: nn.Module, tensors: dict[str, Tensor]) -> Iterator[str]:
    stored = {id(tensor) for tensor in tensors.values()}
    for layer in adapted_layers(model).values():  # which another file is for
        stored |= {id(p) for held in inactive.waiting(layer).values() for p in held.parameters()}
    forgotten = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in stored
    ]
    if forgotten:
        yield f"trained but not saved (name their modules in modules_to_save): {', '.join(forgotten)}"


def _lost_in_the_file(model: nn.Module, layers: Container[str]) -> Iterator[str]:
    for names in names_by_layer(model).values():
        if names[0] in layers and len(names) > 1:
            yield f"{' and '.join(names)} are one layer, which PEFT adapts under the first name alone"


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


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str] | Adapter,
    *,
    is_trainable: bool | None = None,
    adapter: str | None = None,
) -> nn.Module:
    """Loads an adapter in PEFT's format, or bottleneck adapters, from ``folder`` into ``model``; returns
    ``model``.

    The layers that it is for may be plain ones, which are adapted now (and the rest of the
    model is frozen, as ``adapt`` does), or adapted already with the same rank, whose values
    and scaling are replaced (their dropout stays).
    Modules stored whole (``modules_to_save``) are loaded too, and so are embeddings that PEFT stored
    beside the adapter. A weight that several modules share stays shared. Everything is checked and
    made before anything is changed: on an error the model is as it was.

    Args:
        model: the base model, or one that is adapted already.
        folder: where ``save_adapter`` or PEFT's ``save_pretrained`` wrote; or an ``Adapter``.
        is_trainable: True: the adapter and the modules stored whole are trained from now on. False:
            they are frozen, as PEFT's ``from_pretrained`` has it unless told otherwise. None: what is
            adapted now is trained, and with it the modules stored whole; where all layers were adapted
            already, everything stays as frozen or trained as it is. In no case does the model change
            between training and evaluation.
        adapter: which of several adapters gets the values; one that the model doesn't have yet is
            added to its adapted layers, and waits (``set_adapter``). None is the active one. Another
            one takes the active one's place in the model meanwhile: nothing else may use the model.

    Raises:
        FileNotFoundError: ``folder`` has no config or no safetensors file. Pickles are never read.
        NotADirectoryError: ``folder`` is a file.
        ValueError: the file doesn't fit the model, or has what lorafast doesn't compute or know; the
            message names the layer or the field. Or the two files are not of one save.
        ImportError: safetensors is not installed.
    """
    inner = unwrapped(model)
    source = folder
    if not isinstance(source, Adapter):
        safetensors()
        (raw, config), tensors = read_pair(Path(source), lambda *given: (given[0], _parse(*given)))
        if isinstance(config, bottleneck_io.BottleneckConfig):
            if adapter is not None:
                raise ValueError(f"adapter is {adapter!r}, but bottleneck adapters have no names")
            return _load_bottlenecks(model, config, tensors, is_trainable)
        assert isinstance(raw, dict)
        source = Adapter(raw, tensors)
    if adapter is None:
        _load(inner, source, is_trainable)
    else:
        _load_as(inner, adapter, source, is_trainable)
    return model


def _load(model: nn.Module, source: Adapter, is_trainable: bool | None) -> None:
    config = source.parsed()
    adapters, others = _by_layer(source.tensors, dict(model.named_modules(remove_duplicate=False)))
    _check_layers(model, config, adapters)
    base = _check_others(model, config, others, adapters)
    put_into(model, config, adapters, base, is_trainable)


def _load_as(model: nn.Module, name: str, source: Adapter, is_trainable: bool | None) -> None:
    """As ``_load``, into the adapter ``name``, which is added where there is none."""
    names, config = adapter_names(model), source.parsed()
    if name == names[0]:
        _load(model, source, is_trainable)
        return
    if is_trainable:
        raise ValueError(f"is_trainable is True, and {name!r} isn't active: call set_adapter after")
    if config.modules_to_save:
        raise ValueError(
            f"the adapter has modules_to_save {list(config.modules_to_save)}, which the model has once, "
            "for all its adapters"
        )
    if name not in names:
        add_to_each(
            model,
            name,
            lambda place, layer: inactive.add(
                layer, name, config.rank(place), alpha=config.alpha(place),
                dropout=config.lora_dropout, use_rslora=config.use_rslora,
                use_dora=config.use_dora, adapter_dtype=None,
            ),
        )  # fmt: skip
    try:
        with showing(model, name):
            _load(model, source, None)
    except BaseException:
        if name not in names:
            delete_adapter(model, name)
        raise


def _parse(raw: object, path: Path) -> AdapterConfig | bottleneck_io.BottleneckConfig:
    if bottleneck_io.is_bottleneck_config(raw):
        return bottleneck_io.parse(raw, path)
    return parse_config(raw, path)


def _load_bottlenecks(
    model: nn.Module,
    config: bottleneck_io.BottleneckConfig,
    tensors: dict[str, Tensor],
    is_trainable: bool | None,
) -> nn.Module:
    inner = unwrapped(model)
    adapters, others = bottleneck_io.split(config, tensors)
    bottleneck_io.check_places(inner, config)
    state = _tensors(inner)
    for name, tensor in others.items():
        if not stored_whole(_owner(name), config.modules_to_save):
            raise ValueError(
                f"the file has {name}, which is no bottleneck's and not part of modules_to_save "
                f"{list(config.modules_to_save)}"
            )
        _check_value(name, tensor, state)
    for name in state:
        if stored_whole(_owner(name), config.modules_to_save) and name not in others:
            raise ValueError(f"{name} is part of modules_to_save, and the file doesn't have it")
    base = [(state[name], tensor) for name, tensor in others.items()]
    bottleneck_io.put_into(inner, config, adapters, base, is_trainable)
    return model


Adapters = dict[str, dict[str, Tensor]]
"""Adapters' parameters by the names of their layers."""


def _by_layer(
    tensors: dict[str, Tensor], modules: Container[str]
) -> tuple[Adapters, dict[str, Tensor]]:
    """The adapters in the file for a model of these modules, and all other tensors by their name."""
    adapters: Adapters = {}
    others = {}
    found = {key: _adapter_key(key, modules) for key in tensors}
    if not any(found.values()):
        names = ", ".join(map(repr, sorted(tensors)[:3])) or "none"
        ending = next(iter(PEFT_NAMES))
        raise ValueError(
            f"the file has no LoRA tensors: its names are {names}{' ...' if len(tensors) > 3 else ''}, "
            f"expected PEFT's, such as {PREFIX}<layer>.{ending}"
        )
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise ValueError(f"tensor {key!r} doesn't begin with {PREFIX!r}: not PEFT's format")
        one = found[key]
        if one is None:
            others[key.removeprefix(PREFIX)] = tensor
        else:
            name, parameter = one
            adapters.setdefault(name.removeprefix(PREFIX), {})[parameter] = tensor
    return adapters, others


def _adapter_key(key: str, modules: Container[str]) -> tuple[str, str] | None:
    """The layer and the parameter that a tensor of the file is; None if it is no adapter's.

    The A of ``<layer>.base_layer.out_proj`` is an attention's, or that of a layer of that name.
    """
    found = [
        (key.removesuffix(f".{ending}"), parameter)
        for ending, parameter in PEFT_NAMES.items()
        if key.endswith(f".{ending}")
    ]
    there = [one for one in found if one[0].removeprefix(PREFIX) in modules]
    return next(iter(there or found), None)


def _check_layers(model: nn.Module, config: AdapterConfig, adapters: Adapters) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    names = names_by_layer(model)
    targets = config.targets(model)
    plain = [
        modules[n] for n in adapters if n in modules and not isinstance(modules[n], AdapterLayer)
    ]
    sharded = name_of_sharded(model, plain)
    if sharded is not None:
        raise ValueError(
            f"{sharded} is sharded by FSDP: load the adapter before the model is, or adapt it before"
        )
    for name, parameters in adapters.items():
        module = modules.get(name)
        if module is None:
            raise ValueError(f"the file has an adapter for {name}, which the model doesn't have")
        if not isinstance(module, AdapterLayer):
            reason = why_not_here(names.get(module, [name]), module, model)
            if reason is not None:
                raise ValueError(f"{name} can't take the file's adapter: {reason}")
        if name not in targets:
            raise ValueError(f"the file has an adapter for {name}, which the config doesn't target")
        _check_adapter(name, module, config, parameters)
    if plain:
        check_without_peft(model)
    for name in sorted(targets - set(adapters)):
        raise ValueError(f"the config targets {name}, and the file has no adapter for it")
    for name in adapted_layers(model):
        if name not in adapters:
            raise ValueError(f"{name} is adapted, and the file has no adapter for it")


def _check_adapter(
    name: str, module: nn.Module, config: AdapterConfig, parameters: dict[str, Tensor]
) -> None:
    r, kind = config.rank(name), kind_of_layer(module)
    start = module.init_lora_weights if isinstance(module, AdapterLayer) else None
    if start != config.init_lora_weights:
        raise ValueError(
            f"init_lora_weights in the config is {config.init_lora_weights!r}, and {name} was adapted "
            f"with {start!r}: an adapter belongs to what its start has left of W"
        )
    there: dict[str, Tensor] = {}
    if isinstance(module, AdapterLayer):
        if module.r != r:
            raise ValueError(f"{name} is adapted with r = {module.r}, and the file has r = {r}")
        there = module.adapter_parameters()
        sizes = (module.in_features, module.out_features)
        devices = {tensor.device for tensor in there.values()}
    else:
        sizes = kind.features(module)
        weight = kind.frozen_tensor(module)
        # Of an offloaded plain layer the adapter is made where its forward runs.
        devices = {device_of(module, weight)}
        if hasattr(weight, "full_tensor"):
            raise ValueError(
                f"{name} is sharded: load the adapter before the model is, or adapt it before"
            )
    if any(device.type == "meta" for device in devices):
        raise ValueError(_NO_MEMORY.format(name))
    shapes = kind.layer.shapes_over(module, sizes, r, config.use_dora)
    if there and there.keys() != shapes.keys():
        how = "with" if module.use_dora else "without"
        raise ValueError(
            f"{name} is adapted {how} DoRA, and use_dora is {config.use_dora} in the config"
        )
    _check_names(name, kind.layer, parameters, shapes)
    for parameter, shape in shapes.items():
        tensor = parameters[parameter]
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{parameter} of {name} has shape {list(tensor.shape)} in the file, expected "
                f"{list(shape)}: r is {r} in the config, the layer is {sizes[0]} → {sizes[1]}"
            )
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{parameter} of {name} is {tensor.dtype} in the file, expected float16, bfloat16, "
                "float32 or float64"
            )
        if parameter in there:
            reason = why_not_replaceable(there[parameter])
            if reason is not None:
                raise ValueError(f"{parameter} of {name} can't be replaced: {reason}")


def _check_names(
    name: str, layer: type[AdapterLayer], found: Collection[str], expected: Collection[str]
) -> None:
    """Raises ``ValueError`` unless the file has the parameters of the layer's adapter, and no others."""
    for parameter in found:
        if parameter not in expected:
            ending = next(one for one, other in PEFT_NAMES.items() if other == parameter)
            raise ValueError(
                f"the file has {name}.{ending}, expected {' and '.join(expected)} for a "
                f"{layer.__name__} by the config"
            )
    for parameter in expected:
        if parameter not in found:
            raise ValueError(f"{name} has no {layer.peft_names[parameter]} in the file")


def _check_others(
    model: nn.Module, config: AdapterConfig, others: dict[str, Tensor], adapters: Container[str]
) -> list[tuple[Tensor, Tensor]]:
    """Pairs (tensor of the model, its new value) for what the file has besides adapters.

    These are the modules stored whole, and base weights, which PEFT adds where an output head is
    adapted or embeddings were resized.
    """
    values = {}
    embeddings = _embeddings(model)
    for name, tensor in others.items():
        owner, _, last = name.rpartition(".")
        if owner.endswith(_BASE_LAYER) and owner.removesuffix(_BASE_LAYER) in adapters:
            values[f"{owner.removesuffix(_BASE_LAYER)}.{last}"] = tensor
        elif stored_whole(owner, config.modules_to_save) or owner in embeddings:
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
        _check_value(name, tensor, state, _owner(name) in embeddings)
    for name, other in _shared(state):
        if name in values and not _same(values[name], values.get(other, state[other]), state[name]):
            raise ValueError(
                f"{name} is shared with {other} in the model, and in the file it is not: one tensor "
                "can't take both values"
            )
    return [(state[name], tensor) for name, tensor in values.items()]


def _embeddings(model: nn.Module) -> set[str]:
    """All names of the input and output embeddings of a Transformers model."""
    found = set(embeddings_of(model).values())
    modules = model.named_modules(remove_duplicate=False)
    return {name for name, module in modules if module in found}


def _check_value(
    name: str, tensor: Tensor, state: dict[str, Tensor], is_embedding: bool = False
) -> None:
    if name not in state:
        raise ValueError(f"the file has {name}, which the model doesn't have")
    if state[name].shape != tensor.shape:
        hint = ": call model.resize_token_embeddings first" if is_embedding else ""
        raise ValueError(
            f"{name} has shape {list(tensor.shape)} in the file, expected "
            f"{list(state[name].shape)}{hint}"
        )
    if state[name].is_meta:
        raise ValueError(_NO_MEMORY.format(name))
    dtype = state[name].dtype
    if tensor.dtype != dtype and (
        dtype.is_floating_point != tensor.is_floating_point()
        or (tensor.is_floating_point() and tensor.dtype not in FLOATS)
    ):
        raise ValueError(f"{name} is {tensor.dtype} in the file, expected {dtype}")
    reason = why_not_replaceable(state[name])
    if reason is not None:
        raise ValueError(f"{name} can't be replaced: {reason}")


def _same(one: Tensor, other: Tensor, like: Tensor) -> bool:
    return torch.equal(one.to(like), other.to(like))
