"""``LoRAOperandLinear``: the ``LoRALinear`` of a weight that is not stored as one dense tensor."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafast import operands, ops
from lorafast.core.context import autocast_anywhere
from lorafast.functional import dora_linear, lora_linear
from lorafast.nn import offload
from lorafast.nn.lora_linear import LoRALinear
from lorafast.nn.plain import move_hooks, why_not_its_forward
from lorafast.nn.quantized_linear import QuantizedLinear, quantized_linear_of
from lorafast.nn.stored_weight import StoredWeight, fitted, why_not_stored
from lorafast.operands import Operand, Weight
from lorafast.ops.kept_norm import NormOf
from lorafast.ops.stored_lora_linear import lora_linear_again, remember
from lorafast.ops.unstrided import is_sharded


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
    norm_of: NormOf | None = None,
) -> Tensor:
    """``dora_linear`` over the operand that is stored so."""
    weight, bias = fitted(x, stored, description, bias)
    return dora_linear(
        x, weight, lora_A, lora_B, magnitude, scaling, bias, dropout_p=dropout_p, norm_of=norm_of
    )


# For torch.fx a call is one node, as one of nn.Linear is.
torch.fx.wrap("dora_linear_of")
torch.fx.wrap("lora_linear_of")


@dataclass(frozen=True)
class Requantized:
    """What quantizing a merged weight ``V = W + scaling · B·A`` to ``Q`` lost, as ratios of norms."""

    error: float
    """``‖Q − V‖ / ‖V‖`` (Frobenius)."""
    of_update: float
    """``‖Q − V‖ / ‖V − W‖``: from 1 on as much was lost as the adapter had learnt."""


def _copied(weight: Operand) -> Operand:
    copies = {name: tensor.detach().clone() for name, tensor in weight.tensors().items()}
    return type(weight).build(copies, weight.parameters).to(weight.dtype)


def _ratio(lost: Tensor, whole: Tensor) -> float:
    """0 where nothing was lost, of nothing too."""
    return float(lost / whole) if float(lost) else 0.0


class LoRAOperandLinear(StoredWeight, LoRALinear):
    """A ``LoRALinear`` over an operand, whose tensors are its frozen parameters and buffers.

    They have the names that the format gives them, in the ``state_dict`` too, unless
    ``bitsandbytes_keys`` asks for bitsandbytes'. A checkpoint of the layer without an adapter loads as
    it is, and one of bitsandbytes' layer of the same format; one with a dense weight doesn't. Each
    forward builds the operand again from what the layer holds. All else is as in ``LoRALinear``, whose
    ``from_operand`` and ``from_linear`` make it.
    """

    shares_x = False

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
        for i, (name, tensor) in enumerate(weight.tensors().items()):
            # Codes. FSDP2 shards parameters, and casts no bytes; DDP sends buffers in each forward.
            if i == 0 and not isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
                tensor = nn.Parameter(tensor, requires_grad=False)
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
            aside = self._forward_aside(x)
            if aside is not None:
                return aside
        dropout_p = self.dropout if self.training else 0.0
        # torch.fx sees the other call.
        if dropout_p == 0.0 and type(x) is Tensor and not (x.is_nested or autocast_anywhere()):
            return self._forward_again(x)
        return lora_linear_of(
            x, self._stored(), self._description, self.lora_A, self.lora_B, self._scaling, self.bias,
            dropout_p,
        )  # fmt: skip

    def _forward_again(self, x: Tensor) -> Tensor:
        """Without dropout and autocast: as the last call, if this one is like it."""
        p, buffers = self._parameters, self._buffers
        try:
            # nn.Module.__getattr__ for each costs more.
            stored: list[Any] = [p[n] if n in p else buffers[n] for n in self._stored_names]
            lora_A: Any = p["lora_A"]
            lora_B: Any = p["lora_B"]
            bias = p["bias"]
        except KeyError:  # a parametrization or a wrapper computes one of them
            stored, lora_A, lora_B, bias = self._stored(), self.lora_A, self.lora_B, self.bias
        y = lora_linear_again(
            x, stored, self._description, lora_A, lora_B, self._scaling, bias, self._memory
        )
        if y is not None:
            return y
        weight, fitting = fitted(x, stored, self._description, bias)
        y = lora_linear(x, weight, lora_A, lora_B, self._scaling, fitting)
        if fitting is bias and not torch.compiler.is_compiling():
            remember(
                self._memory, x, weight, lora_A, lora_B, self._scaling, bias, self._description
            )
        return y

    def fitted(self, x: Tensor) -> tuple[Weight, Tensor | None]:
        """The weight and the bias as a product with ``x`` takes them."""
        return fitted(x, self._stored(), self._description, self.bias)

    def _forward_dora(self, x: Tensor) -> Tensor:
        return dora_linear_of(
            x, self._stored(), self._description, self.lora_A, self.lora_B, self.lora_magnitude,
            self._scaling, self.bias, self.dropout if self.training else 0.0,
            self._norm_of(x, ops.weight_norm),
        )  # fmt: skip

    def base_forward(self, x: Tensor) -> Tensor:
        """``x·Wᵀ + bias``, ``[..., out_features]``, as a ``QuantizedLinear`` computes it."""
        return quantized_linear_of(x, self._stored(), self._description, self.bias)

    def without_adapter(self) -> QuantizedLinear:
        """The frozen layer by itself, over the same tensors, without its hooks."""
        weight = self.operand()
        assert isinstance(weight, Operand)
        return QuantizedLinear.from_operand(weight, self.bias).train(self.training)

    def base_weight(self) -> Tensor:
        """W as ``[out_features, in_features]``, made dense; sharded if its codes are."""
        stored: list[Any] = self._stored()
        if not any(map(is_sharded, stored)):
            return operands.as_dense(self.operand())
        if self._local is not None:
            cut: Tensor = self._local.dense_of(self)
            return cut
        from torch.distributed.tensor import distribute_tensor

        gathered = [one.full_tensor() if is_sharded(one) else one for one in stored]
        dense = operands.as_dense(operands.build(gathered, self._description))
        B: Any = self.lora_B
        if not is_sharded(B):
            return dense
        # Every rank has it whole: each keeps its shard, and nothing is sent.
        return distribute_tensor(dense, B.device_mesh, B.placements, src_data_rank=None)

    def to_quantized(self) -> tuple[QuantizedLinear, Requantized]:
        """The merged weight, quantized again as the frozen one is, in a layer; and what that lost.

        ``W + scaling · B·A`` is summed in float32, from which it is rounded once, to codes; where the
        sum is W, its codes stay. This layer stays as it is; the bias is shared.

        Raises:
            ValueError: as for ``merge()``; or nothing quantizes to the format; or ``forward`` was
                replaced on this instance, by Accelerate too.
        """
        reason = why_not_its_forward(self, type(self))
        if reason is None and is_sharded(self._stored()[0]):
            reason = "its codes are sharded: merge it dense, or quantize the merged model again"
        if reason is None and offload.hooks_of(self):
            reason = "Accelerate's hook serves its weight: remove it before quantizing again"
        if reason is not None:
            raise ValueError(reason)
        weight = self.operand()
        assert isinstance(weight, Operand)
        with torch.inference_mode(False), torch.no_grad():
            before = weight.to(torch.promote_types(weight.dtype, torch.float32)).dense()
            self._check_mergeable(before, (self.out_features, self.in_features))
            merged = self._with_delta(before, dim=1)
            made = weight.like(merged)
            if torch.equal(merged, before):  # whose codes are then the nearest to it
                made = _copied(weight)
            again = made.to(merged.dtype).dense()
            lost, update = (again - merged).norm(), (merged - before).norm()
            found = Requantized(_ratio(lost, merged.norm()), _ratio(lost, update))
            layer = QuantizedLinear.from_operand(made, self.bias)
        return layer.train(self.training), found

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
    """The reason for which no ``LoRAOperandLinear`` can hold ``weight`` and ``bias``, or None."""
    return why_not_stored(weight, bias, LoRAOperandLinear.taken_names())
