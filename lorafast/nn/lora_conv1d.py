"""``LoRAConv1D``: the ``LoRALinear`` of a layer that keeps its weight as ``[in, out]``."""

from typing import Any

import torch
from torch import Tensor, nn

from lorafast.functional import lora_linear
from lorafast.nn.adapter_layer import AdapterLayer
from lorafast.nn.lora_linear import LoRALinear
from lorafast.operands import kept_transposed
from lorafast.ops.siblings import Sibling

# For torch.fx a call is one node, as one of nn.Linear is.
torch.fx.wrap("lora_linear")


class LoRAConv1D(LoRALinear):
    """A ``LoRALinear`` over Transformers' ``Conv1D``; ``weight`` is ``[in_features, out_features]``.

    It computes with a view of the weight, and all else is as in ``LoRALinear``, whose ``from_linear``
    makes it.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError("a LoRAConv1D is made by LoRALinear.from_linear(conv1d, r)")

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` → ``[..., out_features]``."""
        if self._aside:
            aside = self._forward_aside(x)
            if aside is not None:
                return aside
        p = self._parameters
        try:
            weight, bias, lora_A, lora_B = p["weight"], p["bias"], p["lora_A"], p["lora_B"]
        except KeyError:  # a parametrization or a wrapper computes one of them
            weight, bias, lora_A, lora_B = self.weight, self.bias, self.lora_A, self.lora_B
        dropout_p = self.dropout if self.training else 0.0
        W = kept_transposed(weight)  # type: ignore[arg-type]
        return lora_linear(x, W, lora_A, lora_B, self._scaling, bias, dropout_p=dropout_p)  # type: ignore[arg-type]

    def base_forward(self, x: Tensor) -> Tensor:
        """What ``Conv1D`` computes: ``x·W + bias``, ``[..., out_features]``."""
        y: Tensor = AdapterLayer.base_forward(self, x)
        return y

    def sibling(self) -> Sibling | None:
        """As of a ``LoRALinear``, with a view of the weight."""
        found = super().sibling()
        return None if found is None else found._replace(weight=kept_transposed(found.weight))

    def reset_parameters(self) -> None:
        """Draws all parameters anew, the frozen ones as ``Conv1D`` does."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.reset_adapter()

    def base_weight(self) -> Tensor:
        """W as ``[out_features, in_features]``, a view."""
        return kept_transposed(self.weight)

    def _as_kept(self, W: Tensor) -> Tensor:
        return W.transpose(0, 1).contiguous()

    def _plain_weight(self) -> Tensor:
        return self.merged_weight().t().contiguous()

    def peft_fields(self) -> dict[str, object]:
        """As of a ``LoRALinear``, but that the weight is kept transposed."""
        return super().peft_fields() | {"fan_in_fan_out": True}

    def pack_(self) -> "LoRAConv1D":
        """Packs the merged weight; see ``LoRALinear.pack_``.

        Raises:
            ValueError: the layer isn't merged, or the weight can't be packed.
        """
        if not self.merged:
            raise ValueError(
                "weight can't be packed: a Conv1D keeps it transposed, merge the layer first"
            )
        super().pack_()
        return self
