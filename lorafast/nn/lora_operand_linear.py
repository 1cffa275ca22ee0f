"""``LoRAOperandLinear``: the ``LoRALinear`` of a weight that is not stored as one dense tensor."""

from typing import Any

import torch
from torch import Tensor, nn

from lorafast import operands
from lorafast.core.context import autocast_enabled
from lorafast.core.dtypes import FLOAT_NAMES, FLOATS
from lorafast.functional import dora_linear, lora_linear
from lorafast.nn import offload
from lorafast.nn.lora_linear import LoRALinear
from lorafast.nn.plain import move_hooks
from lorafast.operands import Operand, Weight


def lora_linear_of(
    x: Tensor,
    stored: list[Tensor],
    description: str,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """``lora_linear`` over the operand that is stored so: of torch.fx's nodes none is an operand."""
    weight, bias = _fitted(x, stored, description, bias)
    return lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p=dropout_p)


def dora_linear_of(
    x: Tensor,
    stored: list[Tensor],
    description: str,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """``dora_linear`` over the operand that is stored so."""
    weight, bias = _fitted(x, stored, description, bias)
    return dora_linear(x, weight, lora_A, lora_B, magnitude, scaling, bias, dropout_p=dropout_p)


# For torch.fx a call is one node, as one of nn.Linear is.
torch.fx.wrap("dora_linear_of")
torch.fx.wrap("lora_linear_of")


class LoRAOperandLinear(LoRALinear):
    """A ``LoRALinear`` over an operand, whose tensors are its frozen parameters and buffers.

    They have the names that the format gives them, in the ``state_dict`` too: a checkpoint of the layer
    without an adapter loads as it is, one with a dense weight doesn't. Each forward builds the operand
    again from what the layer holds. All else is as in ``LoRALinear``, whose ``from_operand`` and
    ``from_linear`` make it.
    """

    _description: str

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError("a LoRAOperandLinear is made by LoRALinear.from_operand(weight, r)")

    @classmethod
    def of_layer(cls, layer: nn.Module, weight: Operand, r: int, **options: Any) -> LoRALinear:
        """Takes the place of ``layer``, whose weight is ``weight``: with its bias, hooks and mode."""
        device = offload.device_of(layer, operands.stored(weight)[0])
        made = cls.over(weight, r, bias=getattr(layer, "bias", None), device=device, **options)
        move_hooks(layer, made)
        offload.wrap(layer, made)
        if offload.hooks_of(layer):
            made._reset_magnitude()  # of a weight that the hook brings
        made.training = layer.training
        return made

    @classmethod
    def over(
        cls,
        weight: Operand,
        r: int,
        *,
        bias: Tensor | None,
        alpha: float | None,
        dropout: float,
        use_rslora: bool,
        use_dora: bool,
        adapter_dtype: torch.dtype | None,
        device: torch.device | None = None,
    ) -> "LoRAOperandLinear":
        """As ``LoRALinear.from_operand``; ``device``: the adapter's, by default the weight's."""
        reason = why_not_held(weight, bias)
        if reason is not None:
            raise TypeError(f"weight can't be adapted: {reason}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        N, K = weight.shape
        layer._set_linear(K, N, r, alpha, dropout, use_rslora, use_dora)
        layer._description = operands.describe(weight)
        layer._stored_names = tuple(weight.tensors())
        for name, tensor in weight.tensors().items():
            if isinstance(tensor, nn.Parameter):
                layer.register_parameter(name, tensor)
            else:
                layer.register_buffer(name, tensor)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias.detach(), requires_grad=False)
        layer.register_parameter("bias", bias)
        layer._add_adapter(weight.dtype, device or weight.device, adapter_dtype)
        # Last: until here an error leaves the tensors as they were.
        for name, parameter in layer.named_parameters():
            if name not in cls.peft_names:
                parameter.requires_grad_(False)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` → ``[..., out_features]``."""
        if self._aside:
            return self._forward_aside(x)
        return lora_linear_of(
            x, self._stored(), self._description, self.lora_A, self.lora_B, self._scaling, self.bias,
            self.dropout if self.training else 0.0,
        )  # fmt: skip

    def _forward_dora(self, x: Tensor) -> Tensor:
        return dora_linear_of(
            x, self._stored(), self._description, self.lora_A, self.lora_B, self.lora_magnitude,
            self._scaling, self.bias, self.dropout if self.training else 0.0,
        )  # fmt: skip

    def _apply(self, fn: Any, recurse: bool = True) -> "LoRAOperandLinear":
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

    def base_weight(self) -> Tensor:
        """W as ``[out_features, in_features]``, made dense."""
        return operands.as_dense(self.operand())

    def reset_parameters(self) -> None:
        """Draws the adapter anew. The frozen tensors stay: only a checkpoint has values for them."""
        self.reset_adapter()

    def pack_(self) -> "LoRAOperandLinear":
        """Packs the merged weight; see ``LoRALinear.pack_``.

        Raises:
            ValueError: the layer isn't merged, or the weight can't be packed.
        """
        if not self.merged:
            raise ValueError(
                f"weight can't be packed: it is stored as {self._format()}, merge the layer first"
            )
        super().pack_()
        return self

    def _packable(self) -> list[Tensor]:
        return [] if self._merged_weight is None else [self._merged_weight]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *others: Any, **more: Any
    ) -> None:
        errors: list[str] = others[-1]
        reason = self._why_not_loaded(state_dict, prefix)
        if reason is not None:
            errors.append(f"{prefix[:-1] or 'the layer'} {reason}")
            names = {prefix + name for name in self._stored_names}
            state_dict = {key: value for key, value in state_dict.items() if key not in names}
        super()._load_from_state_dict(state_dict, prefix, *others, **more)

    def _why_not_loaded(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """What a checkpoint stores in another way than this layer: copied it would be wrong."""
        own = f"stores its weight as {self._format()} ({', '.join(self._stored_names)})"
        if f"{prefix}weight.absmax" in state_dict:
            return (
                f"{own}, and the checkpoint is of a layer of bitsandbytes: load it into that layer, "
                "then adapt it"
            )
        if prefix + "weight" in state_dict and "weight" not in self._stored_names:
            return f"{own}, and the checkpoint has a dense one"
        for name, tensor in zip(self._stored_names, self._stored(), strict=True):
            given = state_dict.get(prefix + name)
            held = tensor.dtype
            if isinstance(given, Tensor) and given.is_floating_point() != held.is_floating_point:
                return f"stores {name} as {held}, and the checkpoint as {given.dtype}"
        return None

    def _format(self) -> str:
        return self._description.partition("|")[0]

    def extra_repr(self) -> str:
        """The arguments, and the format."""
        return f"{super().extra_repr()}, format={self._format()}"


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


def _fitted(
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


def why_not_held(weight: Any, bias: object) -> str | None:
    """The reason for which no layer can hold ``weight`` and ``bias``, or None if one can."""
    if not isinstance(weight, Operand):
        kind = type(weight).__name__
        return f"it is a {kind}, expected an operand (LoRALinear.from_linear takes a layer)"
    if weight.format not in operands.formats():
        return f"its format {weight.format!r} is not registered (lorafast.operands.register)"
    for name, tensor in weight.tensors().items():
        taken = name in LoRAOperandLinear.taken_names()
        if not name.isidentifier() or (taken and name != "weight"):
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
