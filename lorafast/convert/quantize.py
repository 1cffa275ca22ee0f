"""``quantize``: linear layers of a model become frozen ones whose weights are stored in few bits."""

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from lorafast import operands
from lorafast.convert import encoders
from lorafast.convert import targets as _targets
from lorafast.convert.fsdp import name_of_sharded
from lorafast.convert.kinds import adapted_layers, has_peft_adapter
from lorafast.convert.places import why_not_called
from lorafast.convert.targets import ALL_LINEAR, Pattern, matches
from lorafast.core.dtypes import FLOATS
from lorafast.core.problem import PLAIN
from lorafast.nn import QuantizedLinear, offload
from lorafast.nn.adaptable import why_not_linear
from lorafast.nn.checks import count
from lorafast.nn.plain import carry, move_hooks, stock_class
from lorafast.operands import FP8, W8A8

_HEADS = ("lm_head",)


def quantize(
    model: nn.Module,
    format: str = "nf4",
    *,
    targets: Pattern = ALL_LINEAR,
    exclude: Pattern | None = None,
    block: int | None = None,
    nested: bool | None = None,
    activation: str | None = None,
) -> nn.Module:
    """Replaces linear layers of ``model`` by frozen ones whose weights are stored in ``format``.

    Each becomes a ``lorafast.nn.QuantizedLinear``, which ``lorafast.adapt`` wraps. Layers are replaced
    one after another, and the model holds the dense weight of each no longer before the next is made.

    Args:
        model: any module; changed in place. If it is itself a linear layer, use what is returned.
        format: ``"nf4"`` or ``"fp4"`` (QLoRA's, as bitsandbytes stores them), ``"int8"`` or ``"fp8"``
            (a scale each row).
        targets: ``"all-linear"``, every ``nn.Linear`` and GPT-2's ``Conv1D`` but those of a Transformers
            model's output head or classifier, one named ``lm_head`` and one that shares its weight with
            another module; or names or a regex, as for ``lorafast.adapt``.
        exclude: layers to leave out, given like ``targets``.
        block: of 4-bit formats, elements that share a scale; None is 64.
        nested: of 4-bit formats, whether scales are quantized in turn; None is True.
        activation: of ``"fp8"`` alone, ``"fp8"``: x is rounded too, and multiplied in 8 bits
            (``lorafast.operands.W8A8``), which changes what the model computes.

    Returns:
        ``model``.

    Raises:
        ValueError: a name or regex matches no layer, the format or an option is none, the model has
            adapters, or nothing is left to quantize.
        TypeError: a layer that was asked for can't be quantized, or FSDP has sharded it. With
            ``"all-linear"`` such a layer is left as it is, and a warning names it.

        The model is unchanged then. If memory runs out on the way, the layers so far are quantized, and
        another call does the rest.
    """
    if activation is not None:
        if (format, activation) != (FP8.format, FP8.format):
            raise ValueError(
                f"activation is {activation!r} and format {format!r}, expected both to be 'fp8': no "
                "other activations are rounded"
            )
        format = W8A8.format
    given = {"block": block, "nested": nested}
    options = {name: value for name, value in given.items() if value is not None}
    operands.quantize(
        torch.zeros((1, 1), device="cpu"), format, **options
    )  # refuses what doesn't fit
    inner = _targets.unwrapped(model)
    _check_without_adapters(inner)
    sharded = name_of_sharded(inner, set(inner.modules()))
    if sharded is not None:
        raise TypeError(f"{sharded} is sharded by FSDP, expected a whole model: quantize it before")
    found = _find(inner, targets, exclude)
    while found:
        layer = next(iter(found))
        names = found.pop(layer)
        made = _quantized(layer, format, options)
        del layer  # whose weight goes, if nobody else holds it
        replaced = _targets.replace(inner, dict.fromkeys(names, made))
    encoders.avoid_fused(inner, _holds)
    return model if replaced is inner else replaced


def _holds(module: nn.Module) -> bool:
    return any(isinstance(inner, QuantizedLinear) for inner in module.modules())


def _quantized(layer: nn.Module, format: str, options: dict[str, int | bool]) -> QuantizedLinear:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    W = (
        weight.detach()
        if isinstance(layer, nn.Linear)
        else operands.kept_transposed(weight.detach())
    )
    bias = layer.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    with torch.inference_mode(False):
        made = QuantizedLinear.from_operand(operands.quantize(W, format, **options), bias)
    carry(layer, made, but=("weight", "bias", "nf"))
    move_hooks(layer, made)
    made.training = layer.training
    return made


def _check_without_adapters(model: nn.Module) -> None:
    adapted = next(iter(adapted_layers(model)), None)
    if adapted is not None:
        raise ValueError(f"{adapted or 'the model'} has an adapter, expected none: quantize first")
    for name, module in model.named_modules():
        if has_peft_adapter(module):
            raise ValueError(
                f"{name or 'the model'} has PEFT's adapter, expected none: quantize first"
            )


def _find(
    model: nn.Module, targets: Pattern, exclude: Pattern | None
) -> dict[nn.Module, list[str]]:
    """The layers to quantize, each with all the names that reach it."""
    targets = _targets.check_pattern("targets", targets)
    exclude = _targets.check_pattern("exclude", () if exclude is None else exclude)
    layers: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if stock_class(module) is not None or isinstance(module, QuantizedLinear):
            layers.setdefault(module, []).append(name)
    _check_reached("exclude", exclude, layers)
    kept = {m: names for m, names in layers.items() if not _any(exclude, names)}
    if targets == ALL_LINEAR:
        return _all_linear(model, kept)
    _check_reached("targets", targets, kept)
    found = {m: names for m, names in kept.items() if _any(targets, names)}
    if not found:
        raise ValueError("targets is [], expected at least one name")
    for layer, names in found.items():
        reason = _why_not(model, layer, names)
        if reason is not None:
            raise TypeError(f"{names[0] or 'the model'} can't be quantized: {reason}")
    return found


def _check_reached(
    argument: str, pattern: str | tuple[str, ...], layers: dict[nn.Module, list[str]]
) -> None:
    """Each of several names, or the regex, must reach a layer."""
    known = [name for names in layers.values() for name in names if name]
    for one in _targets.each(pattern):
        if not any(_any(one, names) for names in layers.values()):
            what = _targets.given(argument, one)
            hint = _targets.hint(one, known)
            raise ValueError(f"{what}, which reaches no nn.Linear of the model{hint}")


def _any(pattern: Pattern, names: Iterable[str]) -> bool:
    return any(matches(pattern, name) for name in names)


def _all_linear(model: nn.Module, kept: dict[nn.Module, list[str]]) -> dict[nn.Module, list[str]]:
    head = _targets.output_head(model)
    aside = set() if head is None else set(head.modules())
    owners: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(module)
    found: dict[nn.Module, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for layer, names in kept.items():
        quantized = operands.of_layer(layer) is not None
        if layer in aside or quantized or any(n.rpartition(".")[2] in _HEADS for n in names):
            continue
        reason = _why_not(model, layer, names)
        if reason is None and len(owners[id(layer.weight)]) > 1:
            reason = "another module shares its weight, which would stay dense"
        if reason is None:
            found[layer] = names
        else:
            refused.setdefault(reason, []).append(names[0] or "the model")
    if refused:
        reasons = [f"{_targets.some(names)}: {reason}" for reason, names in refused.items()]
        if not found:
            raise TypeError(f"nothing can be quantized: {'; '.join(reasons)}")
        warnings.warn("left as they are: " + "; ".join(reasons), stacklevel=4)
    if not found:
        raise ValueError(
            f"targets is {ALL_LINEAR!r}, and the model has no nn.Linear left to quantize"
        )
    return found


def _why_not(model: nn.Module, layer: nn.Module, names: list[str]) -> str | None:
    """The reason for which a layer can't be quantized at its places in the model, or None."""
    if operands.of_layer(layer) is not None:
        return "its weight is quantized already"
    reason = why_not_called(names, model, "quantize") or why_not_linear(layer, _TAKEN)
    if reason is not None:
        return reason
    if offload.hooks_of(layer):
        return "Accelerate's hook serves its weight: quantize the model before it is dispatched"
    weight = layer._parameters["weight"]
    assert weight is not None
    if type(weight) not in PLAIN:
        return f"its weight is a {type(weight).__name__}, expected a plain tensor"
    if weight.is_meta:
        return "its weight is on the device meta, which holds no values: load the model first"
    bias = layer._parameters["bias"]
    if bias is not None:
        columns = weight.shape[0] if isinstance(layer, nn.Linear) else weight.shape[1]
        if bias.shape != (columns,) or bias.device != weight.device or bias.dtype not in FLOATS:
            return (
                f"its bias is {bias.dtype} {list(bias.shape)} on {bias.device}, expected a float of "
                f"[{columns}] on {weight.device}"
            )
    if weight.grad is not None:
        return "its weight has a gradient, and a quantized one is not trained: clear it first"
    bad = count(~weight.isfinite())
    return f"its weight is NaN or infinite in {bad} of {weight.numel()} elements" if bad else None


_TAKEN = (
    frozenset(dir(QuantizedLinear)) | vars(nn.Module()).keys()
    | {"in_features", "out_features", "weight", "bias", "scale", "SCB", "absmax", "_description",
       "_stored_names", "nested_absmax", "nested_quant_map", "nested_offset"}
)  # fmt: skip
