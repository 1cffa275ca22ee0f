"""What starts that read data have in common (EVA, CorDA): fresh adapters, and a run over batches."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafast.convert.disabled import disabled
from lorafast.convert.kinds import kind_of_layer
from lorafast.convert.named import check_not_parallel, exchangeable
from lorafast.nn import LoRALinear, inactive
from lorafast.nn.checks import count

Forward = Callable[[Any, Any], object]
"""``forward(model, batch)`` calls the model."""


def fresh_layers(model: nn.Module, start: str) -> dict[str, LoRALinear]:
    """The linear layers of ``model`` by name, each with one adapter that has changed nothing yet.

    A warning names adapted layers of other kinds, which stay as they are.

    Raises:
        ValueError: there are none, or one has another adapter than that; or the model is sharded, in
            ``DistributedDataParallel``, or one of several processes has it.
    """
    check_not_parallel(model)
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        size = distributed.get_world_size()
        if size > 1:
            raise ValueError(
                f"{start} is computed of the batches of one process, and there are {size}: do so before "
                "they start, and load the saved adapter in each"
            )
    layers = exchangeable(model)
    linear: dict[str, Any] = {
        name: layer for name, layer in layers.items() if kind_of_layer(layer).in_all_linear
    }
    if not linear:
        raise ValueError(
            f"no adapted layer of the model is a linear one, and {start} is of these alone"
        )
    for name, layer in linear.items():
        reason = _why_not_fresh(layer)
        if reason is not None:
            raise ValueError(f"{name or 'the model'} can't begin with {start}: {reason}")
    others = [name for name in layers if name not in linear]
    if others:
        warnings.warn(
            f"{start} is of linear layers alone, and these begin as they did: {', '.join(others)}",
            stacklevel=3,
        )
    return linear


def _why_not_fresh(layer: LoRALinear) -> str | None:
    if layer.merged:
        return "it is merged, unmerge it first"
    names = inactive.names_of(layer)
    if len(names) > 1:
        return f"it has the adapters {', '.join(names)}, delete all but one"
    if layer.init_lora_weights is not None:
        return f"it began with {layer.init_lora_weights!r}, which took a part of W away"
    trained = layer.adapter_parameters()
    if any(tensor.is_meta for tensor in trained.values()):
        return "it is on the device meta, which holds no values"
    if count(trained[layer.watched_parameter] != 0):
        return "its lora_B isn't zero, for it was trained or loaded: adapt anew"
    return None


def device_of(layers: Mapping[str, LoRALinear]) -> torch.device:
    """The device of the first one's adapter."""
    first = next(iter(layers.values()))
    return first.adapter_parameters()[first.watched_parameter].device


@contextlib.contextmanager
def watching(
    model: nn.Module, layers: Mapping[str, nn.Module], look: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Within the block ``look(name, x)`` gets the input ``x [..., K]`` of each call of these layers.

    The model is in evaluation there, without its adapters and without gradients. Each module's mode is
    what it was afterwards.
    """

    def hook(name: str) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            look(name, args[0] if args else next(iter(kwargs.values())))

        return see

    modes = [(module, module.training) for module in model.modules()]
    handles = [
        layer.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        model.eval()
        with disabled(model), torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode


def again_and_again(batches: Iterable[Any]) -> Iterable[Any]:
    """``batches`` such that every loop over them begins with the first one."""
    return list(batches) if iter(batches) is batches else batches


def call(model: nn.Module, batch: Any) -> object:
    """``model(**batch)`` of a mapping, ``model(*batch)`` of a tuple or a list, else ``model(batch)``."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def moved(batch: Any, device: torch.device) -> Any:
    """The tensors of a batch on ``device``."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: moved(value, device) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [moved(value, device) for value in batch]
    return batch


def check_finite(name: str, x: Tensor) -> None:
    """Raises ``ValueError`` if an input of the layer ``name`` has NaN or infinity."""
    if not torch.isfinite(x).all():
        raise ValueError(f"the input of {name or 'the model'} has NaN or infinity in a batch")


def check_seen(names: Iterable[str], seen: Iterable[str]) -> None:
    """Raises ``ValueError`` if a layer was called in none of the batches."""
    missing = [name or "the model" for name in sorted(set(names).difference(seen))]
    if missing:
        raise ValueError(f"no batch reaches {', '.join(missing)}: nobody called the layer")
