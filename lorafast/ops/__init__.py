"""Each operation's contract: checks, registration, backward, choice of backend."""

from lorafast.backends import BackendError, BackendStatus, backends
from lorafast.backends.dequantized import keep_dequantized
from lorafast.backends.forced import use_backend
from lorafast.operands.packed import allow_packing
from lorafast.ops.bottleneck import bottleneck
from lorafast.ops.dora_conv import dora_conv
from lorafast.ops.dora_linear import dora_linear
from lorafast.ops.dropout import dropout
from lorafast.ops.expand import expand
from lorafast.ops.expand_backward import expand_backward
from lorafast.ops.grouped_lora_linear import grouped_lora_linear
from lorafast.ops.linear_expand import linear_expand
from lorafast.ops.lokr_linear import lokr_linear
from lorafast.ops.lora_conv import lora_conv
from lorafast.ops.lora_embedding import lora_embedding
from lorafast.ops.lora_linear import lora_linear
from lorafast.ops.oft_linear import oft_linear
from lorafast.ops.quantized_linear import quantized_linear
from lorafast.ops.scaled_linear import scaled_linear
from lorafast.ops.scaled_lora_linear import scaled_lora_linear
from lorafast.ops.shrink import shrink
from lorafast.ops.shrink_backward import shrink_backward
from lorafast.ops.some_rows import lora_linear_on_some_rows
from lorafast.ops.weight_norm import weight_norm

__all__ = [
    "BackendError",
    "BackendStatus",
    "allow_packing",
    "backends",
    "bottleneck",
    "dora_conv",
    "dora_linear",
    "dropout",
    "expand",
    "expand_backward",
    "grouped_lora_linear",
    "keep_dequantized",
    "linear_expand",
    "lokr_linear",
    "lora_conv",
    "lora_embedding",
    "lora_linear",
    "lora_linear_on_some_rows",
    "oft_linear",
    "quantized_linear",
    "scaled_linear",
    "scaled_lora_linear",
    "shrink",
    "shrink_backward",
    "use_backend",
    "weight_norm",
]
