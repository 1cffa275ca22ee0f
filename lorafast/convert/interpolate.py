"""``interpolate`` and ``interpolation_curve``: the weights between two models (WiSE-FT)."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from lorafast import operands
from lorafast.convert.adapter_io import load_adapter
from lorafast.convert.adapter_pair import read_pair
from lorafast.convert.all_or_nothing import copy_into
from lorafast.convert.checkpoints import Source, Tensors, is_adapter, opened, state_of
from lorafast.convert.exchange import why_not_replaceable
from lorafast.convert.kinds import adapted_layers, has_adapters, has_peft_adapter
from lorafast.convert.peft_format import parse_config
from lorafast.convert.targets import unwrapped
from lorafast.nn import AdapterLayer

_COUNTER = "num_batches_tracked"
_NOT_LINEAR = (
    "whose change of the weight is not linear in scaling: merge a copy of the model, and interpolate "
    "with that"
)
_Result = TypeVar("_Result")


def interpolate(
    model: nn.Module, other: Source | None, alpha: float, *, into: nn.Module | None = None
) -> nn.Module:
    """Moves ``model`` towards ``other``: every weight becomes ``(1 − alpha) · a + alpha · b`` (WiSE-FT:
    Wortsman et al., 2022). In between a model often keeps what it knew and knows most of what it learnt.

        lorafast.interpolate(zero_shot, fine_tuned, 0.5)

    Each is computed in float32 (float64 where one of the two is), as ``torch.lerp`` does, and rounded
    once, to the dtype of the tensor that it is written to. Where a and b are equal it stays a, bit for
    bit. There is no third copy of the model, but of one tensor at a time; a checkpoint is read tensor by
    tensor. Tied weights stay tied. Buffers of floats, the running statistics of norms among them, are
    weights too. Tensors of integers and booleans must be equal, but for ``num_batches_tracked``, which
    stays ``model``'s, and so must the weights of quantized layers.

    **Adapters.** ``other=None`` takes an adapted model between its frozen model (0) and itself (1): the
    change is ``alpha · scaling · B·A``, so each layer's ``scaling`` is multiplied, and nothing is
    rounded. A second call multiplies it again. What is trained besides adapters stays as it is. The
    folder of an adapter as ``other`` is loaded into ``model`` first, as ``load_adapter`` does.
    Between two adapters there is none of the same rank in general (A and B by themselves don't
    interpolate): ``merge`` both models first.

    Args:
        model: a; it is changed in place unless there is ``into``.
        other: b: a model, a ``state_dict``, a safetensors file, a folder with ``model.safetensors`` or
            its index, or the folder of an adapter. None: see above.
        alpha: how far to go; below 0 and above 1 it extrapolates.
        into: a model of the same keys and shapes that is written to instead. It may be ``other``.

    Returns:
        What was written to.

    Raises:
        ValueError: the models differ in a key or a shape (the first one is named), integers differ,
            either has adapters where it can't, DoRA's change is to be scaled, a tensor has no values or
            is sharded, or ``alpha`` is not finite. Nothing is changed.
        TypeError: ``other`` is none of these.
        FileNotFoundError: a checkpoint is not there. Pickles are never read.
        ImportError: it is to be read, and safetensors is not installed.
    """
    alpha = _check_alpha(alpha)
    if other is None or is_adapter(other):
        if into is not None:
            raise ValueError(
                "into is given, and adapters are scaled in place: copy the model first"
            )
        scalings = _scalings(model, other)
        try:
            _scale(scalings, alpha)
        except BaseException:
            _put_back(scalings)
            raise
        return model
    with _between(model, other, into or model) as pairs:
        for pair in pairs:
            pair.write(alpha, pair.a)
    return into or model


def interpolation_curve(
    model: nn.Module,
    other: Source | None,
    alphas: Iterable[float],
    evaluate: Callable[[nn.Module], _Result],
) -> list[tuple[float, _Result]]:
    """``evaluate(model)`` at each of ``alphas`` between ``model`` and ``other``.

        lorafast.interpolation_curve(zero_shot, "fine-tuned", [0, 0.25, 0.5, 0.75, 1], accuracies)

    The weights are those that ``interpolate`` writes, each time from ``model``'s own. These are kept
    aside where they differ from the other's, and are back afterwards, bit for bit, after an error too.

    Args:
        model, other: as for ``interpolate``. The folder of an adapter is loaded and stays loaded.
        alphas: as there.
        evaluate: called with ``model``; it must leave the weights as they are.

    Returns:
        ``(alpha, evaluate(model))`` for each, in their order.

    Raises:
        As ``interpolate``, before the first call of ``evaluate``.
    """
    steps = [_check_alpha(alpha) for alpha in alphas]
    found: list[tuple[float, _Result]] = []
    if other is None or is_adapter(other):
        scalings = _scalings(model, other)
        try:
            for alpha in steps:
                _scale(scalings, alpha)
                found.append((alpha, evaluate(model)))
        finally:
            _put_back(scalings)
        return found
    with _between(model, other, model) as pairs:
        kept = [(pair, pair.a.detach().clone()) for pair in pairs if pair.differs()]
        try:
            for alpha in steps:
                for pair, a in kept:
                    pair.write(alpha, a)
                found.append((alpha, evaluate(model)))
        finally:
            for pair, a in kept:
                copy_into(pair.target, a)
    return found


def _check_alpha(alpha: object) -> float:
    if not isinstance(alpha, float | int) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha!r}, expected a finite number")
    return float(alpha)


@dataclass(frozen=True)
class _Pair:
    """A tensor of both models, and where its interpolation goes."""

    target: Tensor
    a: Tensor
    key: str
    other: Tensors

    def b(self) -> Tensor:
        return self.other.read(self.key).to(self.a.device)

    def differs(self) -> bool:
        b = self.b()
        return self.a.dtype != b.dtype or not torch.equal(self.a, b)

    @torch.no_grad()
    def write(self, alpha: float, a: Tensor) -> None:
        """Writes what lies ``alpha`` of the way from ``a``, the values that the model had."""
        b = self.b()
        dtype = _wide(a.dtype, b.dtype)
        copy_into(self.target, torch.lerp(a.to(dtype), b.to(dtype), alpha))


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    """What is computed in."""
    double = any(dtype in (torch.float64, torch.complex128) for dtype in dtypes)
    if any(dtype.is_complex for dtype in dtypes):
        return torch.complex128 if double else torch.complex64
    return torch.float64 if double else torch.float32


@contextlib.contextmanager
def _between(model: nn.Module, other: Source, into: nn.Module) -> Iterator[list[_Pair]]:
    """The tensors to interpolate, each once, after every check."""
    own, goal = unwrapped(model), unwrapped(into)
    source = unwrapped(other) if isinstance(other, nn.Module) else other
    for what, one in (("the model", own), ("the other model", source), ("into", goal)):
        if isinstance(one, nn.Module) and has_adapters(one):
            raise ValueError(
                f"{what} has adapters, whose factors don't interpolate: merge it first, or scale its "
                "own adapters with other=None"
            )
    ours = state_of(own)
    tied = _tied(ours)
    theirs = ours if goal is own else state_of(goal)
    if theirs is not ours:
        _check_keys(ours, {key: _shape(tensor) for key, tensor in theirs.items()}, "into")
        for key, group in _tied(theirs).items():
            alone = sorted(set(group) - set(tied[key]))
            if alone:
                raise ValueError(
                    f"{key} and {alone[0]} are one tensor in into, and two in the model"
                )
    with opened(source) as tensors:
        shapes = dict(tensors.shapes)
        named = {key: key for key in shapes}
        if not isinstance(other, nn.Module):
            # A file has one of the names of a tied weight, as a rule.
            for key in ours.keys() - shapes.keys():
                found = [alias for alias in tied[key] if alias in tensors.shapes]
                if found:
                    named[key], shapes[key] = found[0], shapes[found[0]]
        _check_keys(ours, shapes, tensors.name)
        codes = _quantized(own)
        pairs = []
        written: set[object] = set()
        for key, a in ours.items():
            pair = _Pair(theirs[key], a, named[key], tensors)
            _check(key, pair, tied[key], key in codes)
            place = _memory(pair.target)
            floats = a.is_floating_point() or a.is_complex()
            if floats and key not in codes and place not in written:
                written.add(place)
                pairs.append(pair)
        yield pairs


def _check(key: str, pair: _Pair, tied: list[str], quantized: bool) -> None:
    """``ValueError`` with the reason for which there is nothing between the two."""
    a, b, other = pair.a, pair.other.read(pair.key), pair.other
    for tensor in (a, b, pair.target):
        if hasattr(tensor, "full_tensor"):  # a DTensor, whose module is slow to import
            raise ValueError(f"{key} is sharded: interpolate before sharding")
        reason = why_not_replaceable(tensor)
        if reason is not None:
            raise ValueError(f"{key} can't be interpolated: {reason}")
    for alias in tied:
        if alias != pair.key and alias in other.shapes and not torch.equal(b, other.read(alias)):
            raise ValueError(
                f"{key} and {alias} are one tensor in the model, and two in {other.name}"
            )
    floats = [t.is_floating_point() or t.is_complex() for t in (a, b, pair.target)]
    if any(floats) and not all(floats):
        raise ValueError(f"{key} is {a.dtype} in the model and {b.dtype} in {other.name}")
    fixed = (quantized or not any(floats)) and key.rpartition(".")[2] != _COUNTER
    if fixed and not torch.equal(a, b.to(a.device)):
        what = "of a quantized weight" if quantized else f"{a.dtype}"
        raise ValueError(
            f"{key} is {what} and differs in {other.name}: there is nothing between the two"
        )


def _check_keys(ours: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], name: str) -> None:
    """``ValueError`` with the first key that differs."""
    for key, tensor in ours.items():
        if key not in shapes:
            raise ValueError(f"{key} is in the model, and not in {name}")
        if shapes[key] != _shape(tensor):
            raise ValueError(
                f"{key} has shape {list(_shape(tensor))} in the model, and {list(shapes[key])} in {name}"
            )
    for key in shapes:
        if key not in ours:
            raise ValueError(f"{key} is in {name}, and not in the model")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    if nn.parameter.is_lazy(tensor):
        raise ValueError("a parameter has no shape yet: run the model once first")
    return tuple(tensor.shape)


def _quantized(model: nn.Module) -> set[str]:
    """The keys of the tensors in which quantized weights are stored."""
    found: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if operands.of_layer(module) is not None:
            prefix = f"{name}." if name else ""
            found |= {f"{prefix}{key}" for key in module.state_dict() if key != "bias"}
    return found


def _memory(tensor: Tensor) -> object:
    """What tensors over the same memory have in common."""
    if tensor.is_meta or hasattr(tensor, "full_tensor") or tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _tied(state: dict[str, Tensor]) -> dict[str, list[str]]:
    """For each key all that stand for the same tensor."""
    groups: dict[object, list[str]] = {}
    for key, tensor in state.items():
        _shape(tensor)
        groups.setdefault(_memory(tensor), []).append(key)
    return {key: group for group in groups.values() for key in group}


_Scaling = tuple[AdapterLayer, float, float]
"""A layer, its ``alpha`` and its ``scaling``."""


def _scale(before: list[_Scaling], factor: float) -> None:
    for layer, _, scaling in before:
        layer.scaling = factor * scaling


def _put_back(before: list[_Scaling]) -> None:
    for layer, alpha, scaling in before:
        layer.scaling = scaling
        layer._alpha = alpha  # which the product may miss by a rounding


def _scalings(model: nn.Module, adapter: Source | None) -> list[_Scaling]:
    """Of the adapted layers, after loading ``adapter`` if there is one."""
    inner = unwrapped(model)
    if any(map(has_peft_adapter, inner.modules())):
        raise ValueError(
            "the model has PEFT's adapters, whose layers have a scale_layer(alpha) of their own"
        )
    if adapter is not None:
        folder = Path(adapter)  # type: ignore[arg-type]
        config, _ = read_pair(folder, parse_config)
        if config.use_dora:
            raise ValueError(f"{folder} is DoRA's, {_NOT_LINEAR}")
        load_adapter(model, folder)
    layers = adapted_layers(inner)
    if not layers:
        raise ValueError("other is None, and the model has no adapter to scale")
    for name, layer in layers.items():
        if layer.use_dora:
            raise ValueError(f"{name or 'the model'} is DoRA's, {_NOT_LINEAR}")
    return [(layer, layer.alpha, layer.scaling) for layer in layers.values()]
