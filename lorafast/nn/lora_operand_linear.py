"""``LoRAOperandLinear``: the ``LoRALinear`` of a weight that is not stored as one dense tensor."""

from typing import Any

import torch
from torch import Tensor, nn

from lorafast import operands
from lorafast.core.dtypes import FLOAT_NAMES, FLOATS
from lorafast.functional import dora_linear, lora_linear
from lorafast.nn import offload
from lorafast.nn.lora_linear import LoRALinear
from lorafast.nn.plain import move_hooks
from lorafast.nn.stored_weight import StoredWeight, fitted
from lorafast.operands import Operand


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
    weight, bias = fitted(x, stored, description, bias)
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
    weight, bias = fitted(x, stored, description, bias)
    return dora_linear(x, weight, lora_A, lora_B, magnitude, scaling, bias, dropout_p=dropout_p)


# For torch.fx a call is one node, as one of nn.Linear is.
torch.fx.wrap("dora_linear_of")
torch.fx.wrap("lora_linear_of")


class LoRAOperandLinear(StoredWeight, LoRALinear):
    """A ``LoRALinear`` over an operand, whose tensors are its frozen parameters and buffers.

    They have the names that the format gives them, in the ``state_dict`` too: a checkpoint of the layer
    without an adapter loads as it is, and one of bitsandbytes' layer of the same format; one with a
    dense weight doesn't. Each forward builds the operand again from what the layer holds. All else is
    as in ``LoRALinear``, whose ``from_operand`` and ``from_linear`` make it.
    """

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

    def extra_repr(self) -> str:
        """The arguments, and the format."""
        return f"{super().extra_repr()}, format={self._format()}"


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
