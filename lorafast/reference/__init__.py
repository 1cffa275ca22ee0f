"""What is right: each operation in plain PyTorch, readable, differentiable, in any float dtype."""

from lorafast.core.dtypes import wide
from lorafast.reference.bottleneck import bottleneck, bottleneck_backward
from lorafast.reference.dequantize import (
    dequantize_eight_bit,
    dequantize_four_bit,
    dequantize_mxfp4,
    scales_of,
)
from lorafast.reference.dora_linear import dora_linear
from lorafast.reference.dropout import dropout, keep_mask, philox_4x32
from lorafast.reference.expand import expand
from lorafast.reference.expand_backward import expand_backward, expand_dB, expand_ds
from lorafast.reference.grouped_lora_linear import (
    as_elements,
    grouped_lora_linear,
    grouped_shrink,
    members,
)
from lorafast.reference.linear_expand import linear_expand
from lorafast.reference.lokr_linear import lokr_linear
from lorafast.reference.lora_conv import conv_shrink, lora_conv, lora_conv_backward
from lorafast.reference.lora_embedding import lora_embedding
from lorafast.reference.lora_linear import lora_linear
from lorafast.reference.oft_linear import oft_linear
from lorafast.reference.quantize import (
    quantize_eight_bit,
    quantize_four_bit,
    quantize_scales,
)
from lorafast.reference.scaled_linear import scaled_dscale, scaled_dx, scaled_linear
from lorafast.reference.scaled_lora_linear import scaled_lora_linear
from lorafast.reference.shrink import shrink
from lorafast.reference.shrink_backward import shrink_backward
from lorafast.reference.weight_norm import weight_norm

__all__ = [
    "as_elements",
    "bottleneck",
    "bottleneck_backward",
    "conv_shrink",
    "dequantize_eight_bit",
    "dequantize_four_bit",
    "dequantize_mxfp4",
    "dora_linear",
    "dropout",
    "expand",
    "expand_backward",
    "expand_dB",
    "expand_ds",
    "grouped_lora_linear",
    "grouped_shrink",
    "keep_mask",
    "linear_expand",
    "lokr_linear",
    "lora_conv",
    "lora_conv_backward",
    "lora_embedding",
    "lora_linear",
    "members",
    "oft_linear",
    "philox_4x32",
    "quantize_eight_bit",
    "quantize_four_bit",
    "quantize_scales",
    "scaled_dscale",
    "scaled_dx",
    "scaled_linear",
    "scaled_lora_linear",
    "scales_of",
    "shrink",
    "shrink_backward",
    "weight_norm",
    "wide",
]
