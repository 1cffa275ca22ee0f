"""``new_head``: a model gets a fresh classifier."""

from typing import Any

import torch
from torch import nn

from lorafast import operands
from lorafast.convert.freeze import check_not_distributed
from lorafast.convert.kinds import has_peft_adapter, is_peft_wrapper
from lorafast.convert.places import COMPILED, embeddings_of
from lorafast.convert.targets import nearest, replace, unwrapped
from lorafast.nn import AdapterLayer
from lorafast.nn.checks import check_rank
from lorafast.nn.plain import features, is_conv1d, is_linear
from lorafast.operands import Weight

_PLACES = ("classifier", "fc", "head", "heads", "score", "classification_head")
"""Where torchvision, timm and Transformers keep a classifier, or what ends with one."""
_COUNTS = ("num_labels", "num_classes")
"""Attributes of models that say how many classes there are."""


def new_head(model: nn.Module, num_labels: int, *, name: str | None = None) -> nn.Linear:
    """Replaces the classifier of ``model`` by ``nn.Linear(in_features, num_labels)``, which is trained.

    The classifier is the linear layer ``classifier``, ``fc``, ``head``, ``heads``, ``score`` or
    ``classification_head`` of the model, or the last one inside the module of that name; of an
    ``nn.Sequential`` it is the last module that has parameters. The new one is initialised as PyTorch's
    are, and has a bias where the old one has, its device, its dtype and its mode. Of a quantized layer
    it has the dtype that the weight is multiplied in. An adapter over the old one goes with it.

    ``model.config.num_labels`` (with it Transformers' ``id2label``), ``model.num_labels`` and
    ``model.num_classes`` follow, where they are. ``config.problem_type`` is forgotten where regression
    (one label) becomes classification, or the other way round.

    Args:
        model: any module; changed in place.
        num_labels: outputs of the new head.
        name: the full name of the linear layer to replace, where the model has another name for it.

    Returns:
        The new layer.

    Raises:
        ValueError: no classifier can be found, or several, or it has no linear layer; it is the output
            embedding of a language model and not named; it lies in a wrapper of PEFT's; or
            ``num_labels`` is no positive integer below 2**31. The model is unchanged.
    """
    check_rank("num_labels", num_labels)
    check_not_distributed(model, "make the head")
    inner = unwrapped(model)
    found = _find(inner) if name is None else _by_name(inner, name)
    old = inner.get_submodule(found)
    reason = _why_not(inner, found, old)
    if reason is not None:
        raise ValueError(f"{found or 'the model'} can't be replaced by a head: {reason}")
    made = _like(old, num_labels)
    places = [n for n, one in inner.named_modules(remove_duplicate=False) if one is old]
    tied = old in embeddings_of(inner).values()
    replace(inner, dict.fromkeys(places, made))
    _tell(inner, num_labels, tied)
    return made


def _find(model: nn.Module) -> str:
    """The name of the classifier."""
    parts = {place: part for place in _PLACES if (part := model._modules.get(place)) is not None}
    found: dict[nn.Module, str] = {}
    for place, part in parts.items():
        inside = _last_linear(part)
        if inside is not None:
            name = f"{place}.{inside}" if inside else place
            found.setdefault(model.get_submodule(name), name)
    if len(found) > 1:
        raise ValueError(
            f"{' and '.join(found.values())} may be the classifier: pass the name of one"
        )
    output = embeddings_of(model).get("output")
    if found and output not in found:
        return next(iter(found.values()))
    if parts and not found:
        place, part = next(iter(parts.items()))
        raise ValueError(
            f"{place} is a {type(part).__name__} without a linear layer, expected a classifier: "
            "pass the name of one"
        )
    if isinstance(model, nn.Sequential):
        with_parameters = [n for n, m in model.named_modules() if m._parameters]
        if with_parameters and is_linear(model.get_submodule(with_parameters[-1])):
            return with_parameters[-1]
    if output is not None:
        name = next(n for n, module in model.named_modules() if module is output)
        raise ValueError(
            f"{name} gives a language model's tokens, expected a classifier: load the model as "
            f"AutoModelForSequenceClassification, or pass name={name!r}"
        )
    raise ValueError(
        f"a {type(model).__name__} has none of {', '.join(_PLACES)}: pass the name of its last linear "
        "layer"
    )


def _is_one(module: nn.Module) -> bool:
    """Whether it is a linear layer, plain, quantized, or with an adapter."""
    if isinstance(module, AdapterLayer):
        return issubclass(module._plain_class, nn.Linear)
    return is_linear(module) and not is_conv1d(module)


def _last_linear(part: nn.Module) -> str | None:
    """The name of the last linear layer in ``part``, "" if it is one."""
    names = [name for name, module in part.named_modules() if _is_one(module)]
    return names[-1] if names else None


def _by_name(model: nn.Module, name: str) -> str:
    if not isinstance(name, str):
        raise ValueError(f"name is {name!r}, expected the full name of a linear layer")
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules or not name:
        heads = [one for one, module in modules.items() if one and _is_one(module)]
        hint = nearest(name, heads, full=True)
        raise ValueError(f"name is {name!r}, which is the full name of no module{hint}")
    return name


def _why_not(model: nn.Module, name: str, old: nn.Module) -> str | None:
    if not name:
        return "the model is itself a linear layer, which nothing can put in its place"
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    for module in (*around, old):
        if has_peft_adapter(module) or is_peft_wrapper(module):
            return f"it lies in PEFT's {type(module).__name__}: make the head before PEFT's model"
    if COMPILED in parts:
        return "torch.compile goes on calling the layer that it was given: make the head before"
    if not _is_one(old):
        return f"it is a {type(old).__name__}, expected an nn.Linear"
    return None


def _like(old: Any, num_labels: int) -> nn.Linear:
    """A fresh layer in the place of ``old``."""
    if isinstance(old, AdapterLayer):
        in_features, x = old.in_features, old.example_input(1)
        dtype, device = x.dtype, x.device
    else:
        in_features = features(old)[0]
        weight: Weight = operands.of_layer(old) or old.weight
        dtype, device = weight.dtype, weight.device
    with torch.inference_mode(False):  # an inference tensor could never be trained
        made = nn.Linear(
            in_features, num_labels, bias=old.bias is not None, device=device, dtype=dtype
        )
    return made.train(old.training)


def _tell(model: Any, num_labels: int, tied: bool) -> None:
    """Writes the number of labels wherever the model keeps it."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "num_labels"):
        if (config.num_labels == 1) != (num_labels == 1) and hasattr(config, "problem_type"):
            config.problem_type = None
        config.num_labels = num_labels
    if tied and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
    for count in _COUNTS:
        if isinstance(vars(model).get(count), int):
            setattr(model, count, num_labels)
