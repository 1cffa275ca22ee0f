"""``StoredWeight``: what layers over an operand have in common, whose tensors are the layer's own."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorafast import operands
from lorafast.core.context import autocast_enabled
from lorafast.core.dtypes import FLOAT_NAMES, FLOATS
from lorafast.operands import Operand, Weight
from lorafast.operands.operand import not_finite

_wanted: ContextVar[bool | None] = ContextVar("bitsandbytes_keys", default=None)


@contextlib.contextmanager
def bitsandbytes_keys(wanted: bool = True) -> Iterator[None]:
    """Within the block, ``state_dict()`` of quantized layers, frozen and adapted, has the keys of
    bitsandbytes' ``Linear4bit`` and ``Linear8bitLt``; with ``wanted`` False, the names of their tensors.

    Of formats that bitsandbytes has: other weights, and sharded ones, keep the names of their tensors.
    Adapters' parameters have theirs. Outside a block a ``QuantizedLinear`` has bitsandbytes' keys and an
    adapted layer the names of its tensors: what finds tensors by the keys of a state, as Accelerate's
    offloading and ``torch.distributed.checkpoint`` do, finds these alone. Both load into both.
    """
    before = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(before)


class StoredWeight(nn.Module):
    """Holds the tensors of an operand by the names that its format gives them.

    They move with the layer. Of a format that keeps its tensors' dtypes they are not cast: W is then
    multiplied in the layer's dtype. A state of bitsandbytes' layer of the same format loads too.
    """

    _description: str
    _stored_names: tuple[str, ...]
    _foreign_keys: ClassVar[bool] = False
    """Whether a state has bitsandbytes' keys where ``bitsandbytes_keys`` doesn't say."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves and casts; where a format keeps its tensors' dtypes, they are moved alone."""
        weight = self.operand()
        if isinstance(weight, Tensor) or not weight.keeps_dtypes:
            super()._apply(fn, recurse)
            return self
        wanted = fn(torch.empty(0, dtype=weight.dtype, device=weight.device)).dtype
        places: tuple[dict[str, Any], ...] = (self._parameters, self._buffers)
        before = [dict(place) for place in places]
        for place in places:
            for name in self._stored_names:
                place.pop(name, None)
        try:
            super()._apply(fn, recurse)
        finally:  # each has its place again
            for place, old in zip(places, before, strict=True):
                place |= {name: place.pop(name, tensor) for name, tensor in old.items()}
        for place in places:
            for name in self._stored_names:
                if name in place:
                    place[name] = _moved(place[name], fn)
        self._description = operands.describe(weight.to(wanted))
        return self

    def _stored(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._stored_names]

    def operand(self) -> Weight:
        """The frozen weight as products take it, built from what the layer holds."""
        return operands.build(self._stored(), self._description)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        wanted = _wanted.get()
        if not (self._foreign_keys if wanted is None else wanted):
            return
        weight = self.operand()
        state = operands.to_foreign_state(weight) if isinstance(weight, Operand) else None
        if state is None:
            return
        for name in self._stored_names:
            destination.pop(prefix + name, None)
        for name, tensor in state.items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *others: Any, **more: Any
    ) -> None:
        errors: list[str] = others[-1]
        description = self._description
        try:
            state_dict, description = self._translated(state_dict, prefix)
            state_dict = self._viewed(state_dict, prefix)
            reason = self._why_not_loaded(state_dict, prefix)
        except ValueError as error:
            how = f"stores its weight as {self._format()}"
            reason = f"{how}, and the checkpoint is of a layer of bitsandbytes: {error}"
        if reason is not None:
            errors.append(f"{prefix[:-1] or 'the layer'} {reason}")
            own = state_dict.keys() & {prefix + name for name in self._stored_names}
            foreign = {
                prefix + name for name in operands.foreign_keys(_without(state_dict, prefix))
            }
            state_dict = {k: v for k, v in state_dict.items() if k not in own | foreign}
            description = self._description
        self._description = description
        metadata, strict, missing, *rest = others
        lacking: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, lacking, *rest, **more)
        # What is refused is there.
        refused = set() if reason is None else {prefix + name for name in self._stored_names}
        missing += [key for key in lacking if key not in refused]

    def _viewed(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """A state whose 8-bit codes are bytes where this layer has numbers, or the other way round, as
        this layer has them."""
        key = prefix + self._stored_names[0]
        found, held = state_dict.get(key), self._stored()[0].dtype
        alike = {getattr(operands.kind_of(self._format()), "code_dtype", held), torch.uint8}
        if not isinstance(found, Tensor) or found.dtype is held or {found.dtype, held} != alike:
            return state_dict
        return state_dict | {key: found.view(held)}

    def _translated(self, state_dict: dict[str, Any], prefix: str) -> tuple[dict[str, Any], str]:
        """A state of bitsandbytes' layer as one of this layer, and the weight's description then.

        Raises:
            ValueError: it is of another format, or of none.
        """
        state = _without(state_dict, prefix)
        found = operands.of_foreign_state(state)
        if found is None:
            return state_dict, self._description
        mine = self.operand()
        if isinstance(mine, Tensor) or not operands.is_same_kind(mine, found):
            held = mine.dtype if isinstance(mine, Tensor) else _kind(mine)
            raise ValueError(f"it is of {_kind(found)}, expected {held}")
        kept = {prefix + name for name in operands.foreign_keys(state)}
        translated = {key: value for key, value in state_dict.items() if key not in kept}
        for name, tensor in found.tensors().items():
            held = getattr(self, name)
            if tensor.dtype is not held.dtype:  # the same bytes
                tensor = tensor.reshape(-1).view(held.dtype)
            translated[prefix + name] = tensor.reshape(held.shape)
        return translated, operands.describe(found.to(mine.dtype))

    def _why_not_loaded(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """What a checkpoint stores in another way than this layer: copied it would be wrong."""
        own = f"stores its weight as {self._format()} ({', '.join(self._stored_names)})"
        if prefix + "weight" in state_dict and "weight" not in self._stored_names:
            return f"{own}, and the checkpoint has a dense one"
        for name, tensor in zip(self._stored_names, self._stored(), strict=True):
            found = state_dict.get(prefix + name)
            held = tensor.dtype
            if isinstance(found, Tensor) and _is_other(found.dtype, held):
                return f"stores {name} as {held}, and the checkpoint as {found.dtype}"
            if isinstance(found, Tensor) and found.shape != tensor.shape:
                shapes = f"{list(tensor.shape)}, and the checkpoint as {list(found.shape)}"
                return f"stores {name} as {shapes}"
        unfit = _not_finite_scale({n: state_dict.get(prefix + n) for n in self._stored_names})
        if unfit is not None:
            return (
                f"stores its weight as {self._format()}, and {unfit} of the checkpoint is NaN or "
                "infinite somewhere, expected finite scales"
            )
        there = [name for name in self._stored_names if prefix + name in state_dict]
        missing = [name for name in self._stored_names if name not in there]
        if there and missing and not self._holds(state_dict, prefix, there):
            return f"{own}, and the checkpoint has {there[0]}, and no {missing[0]}"
        return None

    def _holds(self, state_dict: dict[str, Any], prefix: str, names: list[str]) -> bool:
        """Whether these tensors of a state are the layer's own scales, which then stay: PyTorch's states
        without frozen parameters have them, for they are buffers, and no codes."""
        if self._stored_names[0] in names:
            return False
        pairs = [(getattr(self, name), state_dict[prefix + name]) for name in names]
        return all(
            type(given) is Tensor and not own.is_meta and torch.equal(own, given.to(own.device))
            for own, given in pairs
        )

    def _format(self) -> str:
        return self._description.partition("|")[0]


def _not_finite_scale(stored: Mapping[str, Any]) -> str | None:
    """The name of a tensor of scales that is NaN or infinite somewhere, or None. The first tensor has
    the codes, which may be any floats."""
    _, *scales = stored
    return not_finite({name: stored[name] for name in scales if isinstance(stored[name], Tensor)})


def _without(state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The layer's part of a state, by its own keys."""
    return {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}


def _is_other(given: torch.dtype, held: torch.dtype) -> bool:
    """Whether a copy would be of other numbers: codes in one byte are not converted."""
    if held.itemsize == 1:
        return given is not held
    return given.is_floating_point != held.is_floating_point


def _kind(weight: Operand) -> str:
    return f"{weight.format} ({weight.parameters})"


def _moved(tensor: Tensor, fn: Any) -> Tensor:
    """What ``fn`` makes of a tensor but for its dtype; of a parameter the same one, where it can be."""
    moved: Tensor = fn(tensor.detach())
    if moved.dtype is not tensor.dtype:
        moved = tensor.detach().to(moved.device)
    if not isinstance(tensor, nn.Parameter):
        return moved
    if not torch._has_compatible_shallow_copy_type(tensor, moved):
        return nn.Parameter(moved, requires_grad=False)
    tensor.data = moved
    return tensor


def fitted(
    x: Tensor, stored: list[Tensor], description: str, bias: Tensor | None
) -> tuple[Weight, Tensor | None]:
    """The weight and the bias; of a format that keeps its tensors' dtypes, in the dtype of x."""
    weight = operands.build(stored, description)
    if isinstance(weight, Tensor) or not weight.keeps_dtypes or autocast_enabled(x):
        return weight, bias
    if x.dtype in FLOATS and x.dtype is not weight.dtype:
        weight = weight.to(x.dtype)
    if bias is not None and bias.dtype is not weight.dtype:
        bias = bias.to(weight.dtype)
    return weight, bias


def why_not_stored(weight: Any, bias: object, taken: Collection[str]) -> str | None:
    """The reason for which no layer can hold ``weight`` and ``bias``, or None if one can.

    ``taken``: names that a layer has another use for, but ``weight``.
    """
    if not isinstance(weight, Operand):
        kind = type(weight).__name__
        return f"it is a {kind}, expected an operand (LoRALinear.from_linear takes a layer)"
    if weight.format not in operands.formats():
        return f"its format {weight.format!r} is not registered (lorafast.operands.register)"
    for name, tensor in weight.tensors().items():
        if not name.isidentifier() or (name in taken and name != "weight"):
            return (
                f"it is stored in {name!r}, expected a name that a LoRALinear has no other use for"
            )
        if not isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            return f"its {name} requires a gradient, expected a frozen tensor"
    shape, devices = weight.shape, {tensor.device for tensor in weight.tensors().values()}
    if len(devices) != 1:
        return f"its tensors are on {' and '.join(sorted(map(str, devices)))}, expected one device"
    if len(shape) != 2:
        return f"it has shape {list(shape)}, expected [out_features, in_features]"
    if weight.dtype not in FLOATS:
        return f"it is multiplied in {weight.dtype}, expected {FLOAT_NAMES}"
    unfit = _not_finite_scale(weight.tensors())
    if unfit is not None:
        return f"its {unfit} is NaN or infinite somewhere, expected finite scales"
    return None if bias is None else _why_unfit(weight, bias, *devices)


def _why_unfit(weight: Operand, bias: object, device: torch.device) -> str | None:
    if not isinstance(bias, Tensor):
        return f"its bias is a {type(bias).__name__}, expected a tensor"
    N = weight.shape[0]
    if bias.shape != (N,):
        return f"its bias has shape {list(bias.shape)}, expected [{N}]"
    if bias.dtype is not weight.dtype and not weight.keeps_dtypes:
        return f"its bias is {bias.dtype}, expected {weight.dtype}, the dtype of weight"
    return None if bias.device == device else f"its bias is on {bias.device}, expected {device}"
