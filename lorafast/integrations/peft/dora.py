"""DoRA as PEFT's layer has it, translated into one call of ``functional.dora_linear``."""

import torch
from torch import Tensor

from lorafast import functional
from lorafast.integrations.peft.adapters import Adapter
from lorafast.operands import Weight
from lorafast.ops import weight_norm

__all__ = ["dora_linear", "scale_of", "weight_norm"]


def dora_linear(
    x: Tensor,
    weight: Weight,
    adapter: Adapter,
    magnitude: Tensor,
    bias: Tensor | None,
    training: bool,
) -> Tensor:
    """``y`` of one adapter; ``training`` is that of the layer, which PEFT asks beside the dropout's."""
    lora_A, lora_B, scaling = adapter.lora_A.weight, adapter.lora_B.weight, adapter.scaling
    if isinstance(scaling, Tensor):
        # Its value must not be asked for, or a GPU waits; half precision would round the product.
        dtype = torch.promote_types(lora_B.dtype, torch.float32)
        lora_A, lora_B, scaling = lora_A.to(dtype), lora_B.to(dtype) * scaling, 1.0
    elif not torch.compiler.is_compiling():
        scaling = float(scaling)
    return functional.dora_linear(
        x, weight, lora_A, lora_B, magnitude, scaling, bias,
        dropout_p=adapter.dropout_p, training=training,
    )  # fmt: skip


def scale_of(weight: Weight, adapter: Adapter, magnitude: Tensor) -> Tensor:
    """``magnitude / ‖W + scaling·B·A‖`` of each row, ``[N]``."""
    lora_A, lora_B, scaling = adapter.lora_A.weight, adapter.lora_B.weight, adapter.scaling
    if isinstance(scaling, Tensor):
        dtype = torch.promote_types(lora_B.dtype, torch.float32)
        lora_A, lora_B, scaling = lora_A.to(dtype), lora_B.to(dtype) * scaling, 1.0
    return magnitude / weight_norm(weight, lora_A, lora_B, scaling)
