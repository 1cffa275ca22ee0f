"""``QuantizedLinear``: a frozen linear layer whose weight is stored in few bits."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafast import operands
from lorafast.core.dtypes import FLOAT_NAMES, FLOATS
from lorafast.functional import quantized_linear
from lorafast.nn.stored_weight import StoredWeight, fitted, why_not_stored
from lorafast.operands import Operand


def quantized_linear_of(
    x: Tensor, stored: list[Tensor], description: str, bias: Tensor | None
) -> Tensor:
    """``quantized_linear`` over the operand that is stored so: no node of torch.fx is an operand."""
    weight, bias = fitted(x, stored, description, bias)
    assert isinstance(weight, Operand)
    return quantized_linear(x, weight, bias)


# For torch.fx a call is one node, as one of nn.Linear is.
torch.fx.wrap("quantized_linear_of")


class QuantizedLinear(StoredWeight):
    """``y = x·Wᵀ + bias`` with W and bias frozen, and W stored in a format of ``lorafast.operands``.

    ``from_linear`` makes it, of an operand ``from_operand``, of a checkpoint ``from_state``. The tensors
    of the format are the layer's own: the first, its codes, a frozen parameter, the others parameters
    or buffers. x may have any float dtype, in which W is then multiplied. Casting the layer leaves codes
    and scales as they are.

    Its ``state_dict`` of ``nf4``, of ``fp4`` and of ``int8`` as ``lorafast.quantize`` makes it has the
    keys of bitsandbytes' ``Linear4bit`` and ``Linear8bitLt``, and theirs load here. Other formats, and
    weights that are sharded, have the names that the format gives its tensors, which load too.

    ``bitsandbytes_keys(False)`` saves those names of every format.

    ``lorafast.adapt`` and ``LoRALinear.from_linear`` wrap it.
    """

    _foreign_keys = True
    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError("a QuantizedLinear is made by QuantizedLinear.from_linear(linear)")

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, format: str = "nf4", **options: object
    ) -> "QuantizedLinear":
        """The layer ``linear`` in a format; ``linear`` stays as it is, and the bias is shared, frozen.

        ``options``: of 4-bit formats ``block`` (64), ``nested`` (True) and ``nested_block`` (256).
        ``lorafast.quantize`` looks for what would be lost first.

        Raises:
            TypeError: ``linear`` is no ``nn.Linear``, or its weight is stored in few bits already; or no
                layer can hold what is made, as when the weight is NaN or infinite somewhere.
            ValueError: nothing quantizes to the format, or an option doesn't fit it.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear is a {type(linear).__name__}, expected an nn.Linear")
        reason = operands.why_not_of_layer(linear)
        if operands.of_layer(linear) is not None:
            reason = "its weight is quantized already"
        if reason is not None:
            raise TypeError(f"linear can't be quantized: {reason}")
        weight = operands.quantize(linear.weight.detach(), format, **options)
        return cls.from_operand(weight, linear.bias)

    @classmethod
    def from_operand(cls, weight: Operand, bias: Tensor | None = None) -> "QuantizedLinear":
        """The layer of ``weight [N, K]`` and ``bias [N]``, over their memory.

        Raises:
            TypeError: no layer can hold them, as when a scale is NaN; the message says why.
        """
        reason = why_not_stored(
            weight, bias, frozenset(dir(cls)) | {"bias", "in_features", "out_features"}
        )
        if reason is not None:
            raise TypeError(f"weight can't be held: {reason}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.out_features, layer.in_features = weight.shape
        layer._description = operands.describe(weight)
        layer._stored_names = tuple(weight.tensors())
        for i, (name, tensor) in enumerate(weight.tensors().items()):
            if i == 0 or isinstance(tensor, nn.Parameter):
                layer.register_parameter(name, _frozen(tensor))
            else:
                layer.register_buffer(name, tensor)
        layer.register_parameter("bias", None if bias is None else _frozen(bias))
        return layer

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], prefix: str = "") -> "QuantizedLinear":
        """The layer of a checkpoint with bitsandbytes' keys, over the memory of its tensors.

        ``prefix``: the layer's name in it, with a point at its end.

        Raises:
            ValueError: the checkpoint has no such layer, or one that doesn't fit.
        """
        own = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        weight = operands.of_foreign_state(own)
        if weight is None:
            raise ValueError(f"the state has no quantized layer {prefix!r} of bitsandbytes' keys")
        bias = own.get("bias")
        if bias is not None and not isinstance(bias, Tensor):
            raise ValueError(f"bias is a {type(bias).__name__}, expected a tensor")
        if bias is not None and bias.dtype not in FLOATS:
            raise ValueError(f"bias is {bias.dtype}, expected {FLOAT_NAMES}")
        if bias is not None and isinstance(weight, operands.Int8):
            weight = weight.to(bias.dtype)
        try:
            return cls.from_operand(weight, bias)
        except TypeError as error:
            raise ValueError(str(error)) from error

    def frozen_operand(self) -> Operand:
        """W, over the layer's own tensors: by this ``lorafast.operands.of_layer`` knows the layer."""
        weight = self.operand()
        assert isinstance(weight, Operand)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` → ``[..., out_features]``."""
        return quantized_linear_of(x, self._stored(), self._description, self.bias)

    def dense_weight(self) -> Tensor:
        """W as ``[out_features, in_features]``, made dense."""
        return self.frozen_operand().dense()

    def to_linear(self) -> nn.Linear:
        """A plain layer of W made dense, frozen; the bias is shared."""
        weight = self.dense_weight()
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Sizes and format."""
        weight = self.frozen_operand()
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={weight.format}, {weight.parameters}"
        )


def _frozen(tensor: Tensor) -> nn.Parameter:
    """The tensor as a parameter without a gradient, itself if it is one."""
    if not isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=False)
    tensor.requires_grad_(False)
    return tensor
