"""``warm_up``: kernels are compiled, and plans made, before they are needed."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorafast.nn import offload
from lorafast.nn.adapter_module import AdapterModule, adapters_in


def warm_up(module: nn.Module, rows: Iterable[int]) -> None:
    """Runs every adapter of ``module`` once for each number of rows, forward and backward.

    A kernel is compiled at the first call that needs it, which takes seconds, and once for a bucket of
    rows: ``warm_up(model, [1, 512, 8192])`` does that beforehand, for the layers and bottlenecks that
    ``adapt`` or ``accelerate`` made (or ``module`` itself, if it is one) as they are now: in training or
    not, under the autocast of the caller, on their devices. Where gradients are off, or none is
    required, there is no backward. No ``.grad``, no random number generator and no record of
    ``lorafast tune`` changes; forward hooks of the layers run, as in any call.

    Args:
        module: an adapted layer or a bottleneck, or a model that has some.
        rows: numbers of rows of a layer's input: batch size times sequence length.

    Raises:
        ValueError: there is no adapter, or a number of rows is less than 1.
    """
    counts = list(rows)
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"rows has {count!r}, expected whole numbers of at least 1")
    layers = _layers(module)
    if not layers:
        raise ValueError(
            "the module has no adapter to warm up: lorafast.adapt(model) or "
            "lorafast.accelerate(model) makes some"
        )
    for layer in layers:
        with _generators_kept(layer):
            for count in counts:
                _run(layer, count)


def _layers(module: nn.Module) -> list[Any]:
    """The adapters of ``module``, PEFT's layers too if those are in use."""
    peft = sys.modules.get("lorafast.integrations.peft.layers")
    modules: list[Any] = list(module.modules())
    if peft is None:
        return list(adapters_in(module).values())
    attentions = [one for one in modules if isinstance(one, peft.MultiheadAttention._stock)]
    read = {one.get_base_layer().out_proj for one in attentions}  # and never called
    kinds = (AdapterModule, peft.Linear, peft.MultiheadAttention)
    return [one for one in modules if isinstance(one, kinds) and one not in read]


def _is_left(layer: Any) -> bool:
    """Whether an attention of PEFT's is left to PEFT, which merges into its weights in a forward."""
    from lorafast.integrations.peft import adapters, attention_rules

    return attention_rules.why_stock_attention(layer, adapters.active(layer)) is not None


def _run(layer: Any, rows: int) -> None:
    if _is_attention(layer) and _is_left(layer):
        return
    # Stand-ins, for a gradient that reaches a parameter is seen by its hooks.
    parameters = {
        name: p.detach().requires_grad_(p.requires_grad) for name, p in layer.named_parameters()
    }
    x = _input(layer, rows)
    trained = [p for p in parameters.values() if p.requires_grad]
    if not (trained and torch.is_grad_enabled()):
        _called(layer, parameters, x)
        return
    if x.is_floating_point():
        trained.append(x.requires_grad_())
    y = _called(layer, parameters, x)
    torch.autograd.grad(y, trained, torch.zeros_like(y), allow_unused=True)


def _called(layer: Any, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    arguments: Any = (x,)
    if isinstance(layer, AdapterModule):
        arguments = layer.example_arguments(x)
    elif _is_attention(layer):
        x = x.unsqueeze(1 if layer.batch_first else 0)  # sequences of one token
        arguments = (x, x, x, None, False)  # without the attention's weights
    y = torch.func.functional_call(layer, parameters, arguments)
    first: Tensor = y[0] if isinstance(y, tuple) else y
    return first


def _input(layer: Any, rows: int) -> Tensor:
    if isinstance(layer, AdapterModule):
        return layer.example_input(rows)
    base = layer.get_base_layer()
    attention = _is_attention(layer)
    weight = base.in_proj_weight if attention else base.weight
    width = layer.embed_dim if attention else layer.in_features
    device = offload.device_of(base, weight)
    return torch.zeros((rows, width), dtype=weight.dtype, device=device)


def _is_attention(layer: Any) -> bool:
    """Whether it is an attention of PEFT's."""
    return hasattr(layer, "num_heads") and not isinstance(layer, AdapterModule)


@contextlib.contextmanager
def _generators_kept(layer: nn.Module) -> Iterator[None]:
    """A dropout draws its seed: not from the numbers that come next."""
    devices = {p.device for p in layer.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng([device.index for device in devices]):
        yield
