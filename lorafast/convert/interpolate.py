"""``interpolate`` and ``interpolation_curve``: the weights between two models (WiSE-FT)."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from lorafast import operands
from lorafast.convert.adapter_io import load_adapter
from lorafast.convert.adapter_pair import read_pair
from lorafast.convert.all_or_nothing import all_or_nothing, copy_into
from lorafast.convert.checkpoints import Checkpoint, Tensors, is_adapter, opened, state_of
from lorafast.convert.exchange import why_not_replaceable
from lorafast.convert.kinds import adapted_layers, has_adapters, has_peft_adapter
from lorafast.convert.peft_format import parse_config, stored_whole
from lorafast.convert.targets import unwrapped
from lorafast.nn import AdapterLayer
from lorafast.nn.adapter_module import AdapterModule, adapters_in
from lorafast.nn.checks import check_alpha

_COUNTER = "num_batches_tracked"
_NOT_LINEAR = (
    "whose change of the weight is not linear in scaling: merge a copy of the model, and interpolate "
    "with that"
)
_Result = TypeVar("_Result")


def interpolate(
    model: nn.Module, other: Checkpoint | None, alpha: float, *, into: nn.Module | None = None
) -> nn.Module:
    """Moves ``model`` towards ``other``: every weight becomes ``(1 − alpha) · a + alpha · b`` (WiSE-FT:
    Wortsman et al., 2022). In between a model often keeps what it knew and knows most of what it learnt.

        lorafast.interpolate(zero_shot, fine_tuned, 0.5)

    Each is computed in float32 (float64 where one of the two is), as ``torch.lerp`` does, and rounded
    once, to the dtype of the tensor that it is written to. Where a and b are equal it stays a, bit for
    bit. There is no third copy of the model, but of one tensor at a time; a checkpoint is read tensor by
    tensor. Tied weights stay tied. Buffers of floats, the running statistics of norms among them, are
    weights too. Tensors of integers and booleans must be equal in both, but for ``num_batches_tracked``;
    ``into`` gets ``model``'s. The stored tensors of quantized layers must be equal, in ``into`` too.

    **Adapters.** ``other=None`` takes an adapted model between its frozen model (0) and itself (1): the
    change is ``alpha · scaling · B·A``, so each layer's ``scaling`` is multiplied, and nothing is
    rounded. Bottlenecks are scaled likewise. A second call multiplies it again. What is trained besides
    adapters stays as it is. The folder of an adapter as ``other`` is loaded into ``model`` first, as
    ``load_adapter`` does.
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
            either has adapters where it can't, DoRA's change is to be scaled or one that began as PiSSA
            or OLoRA, two tensors that are written to overlap in memory, a tensor has no values or is
            sharded, or ``alpha`` is not finite. Nothing is changed.
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
        with _undone(model, other):
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
    other: Checkpoint | None,
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
        with _undone(model, other):
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
        """Writes what lies ``alpha`` of the way from ``a``, the values that the model had; of integers
        these."""
        if not _is_float(a):
            copy_into(self.target, a)
            return
        b = self.b()
        dtype = _wide(a.dtype, b.dtype)
        a, b = a.to(dtype), b.to(dtype)
        # Of two infinities lerp makes NaN, and of zeros of two signs another one.
        copy_into(self.target, torch.where(a == b, a, torch.lerp(a, b, alpha)))


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    """What is computed in."""
    double = any(dtype in (torch.float64, torch.complex128) for dtype in dtypes)
    if any(dtype.is_complex for dtype in dtypes):
        return torch.complex128 if double else torch.complex64
    return torch.float64 if double else torch.float32


@contextlib.contextmanager
def _between(model: nn.Module, other: Checkpoint, into: nn.Module) -> Iterator[list[_Pair]]:
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
    with opened(other, "other", "the other model") as tensors:
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
        written: dict[object, str] = {}
        for key, a in ours.items():
            pair = _Pair(theirs[key], a, named[key], tensors)
            _check(key, pair, tied[key], key in codes)
            place = _memory(pair.target)
            changes = _is_float(a) or pair.target is not a
            if changes and key not in codes and place not in written:
                written[place] = key
                pairs.append(pair)
        _check_apart({key: theirs[key] for key in written.values()})
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
    floats = [*map(_is_float, (a, b, pair.target))]
    for one, where in ((b, other.name), (pair.target, "into")):
        if _is_float(one) != floats[0] or (
            not floats[0] and where == "into" and one.dtype != a.dtype
        ):
            raise ValueError(f"{key} is {a.dtype} in the model and {one.dtype} in {where}")
    if quantized and not torch.equal(a, pair.target.to(a.device)):
        raise ValueError(f"{key} is of a quantized weight and differs in into")
    fixed = (quantized or not any(floats)) and key.rpartition(".")[2] != _COUNTER
    if fixed and not torch.equal(a, b.to(a.device)):
        what = "of a quantized weight" if quantized else f"{a.dtype}"
        raise ValueError(
            f"{key} is {what} and differs in {other.name}: there is nothing between the two"
        )


def _check_apart(targets: dict[str, Tensor]) -> None:
    """``ValueError`` if two of the tensors may share memory: both would be written to."""
    placed = []
    for key, tensor in targets.items():
        if tensor.numel():
            sizes = zip(tensor.shape, tensor.stride(), strict=True)
            last = sum((size - 1) * stride for size, stride in sizes)
            start = tensor.data_ptr()
            end = start + (last + 1) * tensor.element_size()
            placed.append((str(tensor.device), start, end, key))
    placed.sort()
    for (device, _, end, key), (other_device, start, _, other) in pairwise(placed):
        if device == other_device and start < end:
            raise ValueError(
                f"{key} and {other} share memory in different shapes or strides: clone one of them"
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


_Scaling = tuple[AdapterModule, float, float]
"""A layer or a bottleneck, its ``scaling``, and the ``alpha`` of a layer."""


def _scale(before: list[_Scaling], factor: float) -> None:
    for one, scaling, _ in before:
        one.scaling = check_alpha("scaling", factor * scaling)


def _put_back(before: list[_Scaling]) -> None:
    for one, scaling, alpha in before:
        one.scaling = scaling
        if isinstance(one, AdapterLayer):
            one._alpha = alpha  # which the product may miss by a rounding


def _scalings(model: nn.Module, adapter: Checkpoint | None) -> list[_Scaling]:
    """Of the adapted layers, after loading ``adapter`` if there is one."""
    inner = unwrapped(model)
    if any(map(has_peft_adapter, inner.modules())):
        raise ValueError(
            "the model has PEFT's adapters, whose layers have a scale_layer(alpha) of their own"
        )
    for name, layer in adapted_layers(inner).items():
        _check_scalable(name or "the model", layer.use_dora, layer.init_lora_weights)
    if adapter is not None:
        load_adapter(model, Path(adapter))  # type: ignore[arg-type]
    found = adapters_in(inner).values()
    if not found:
        raise ValueError("other is None, and the model has no adapter to scale")
    return [(one, one.scaling, getattr(one, "alpha", one.scaling)) for one in found]


def _check_scalable(name: str, use_dora: bool, start: str | None) -> None:
    """``ValueError`` if ``alpha · scaling`` doesn't lead from the model before ``adapt``."""
    if use_dora:
        raise ValueError(f"{name} is DoRA's, {_NOT_LINEAR}")
    if start is not None:
        raise ValueError(
            f"{name} began as {start!r}, which took a part of the weight away: without the adapter it "
            "is not the model before adapt. Merge it, and interpolate with that model"
        )


@contextlib.contextmanager
def _undone(model: nn.Module, adapter: Checkpoint | None) -> Iterator[None]:
    """Takes ``adapter``, which is loaded within the block, away again if an error ends it."""
    if adapter is None:
        yield
        return
    inner, folder = unwrapped(model), Path(adapter)  # type: ignore[arg-type]
    config, _ = read_pair(folder, parse_config)
    _check_scalable(str(folder), config.use_dora, config.init_lora_weights)
    before = dict(inner.named_modules(remove_duplicate=False))
    adapted = list(adapted_layers(inner).values())
    kept = [tensor for layer in adapted for tensor in layer.adapter_parameters().values()]
    for name, module in before.items():
        if stored_whole(name, config.modules_to_save):
            kept += state_of(module).values()
    with all_or_nothing(inner) as undo:
        undo.keep([one for one in kept if not one.is_meta], adapted)
        try:
            yield
        except BaseException:
            for name, module in adapted_layers(inner, remove_duplicate=False).items():
                if before.get(name, module) is not module:
                    undo.replaced[name] = before[name]
                    undo.made[before[name]] = module
            raise
