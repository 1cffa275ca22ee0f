"""Drop-in modules, and the account of which backend serves them."""

from lorafast.nn.adapter_layer import AdapterLayer
from lorafast.nn.bottleneck import Bottleneck
from lorafast.nn.explain import Choice, Explanation, Sharing, explain
from lorafast.nn.lora_attention import LoRAMultiheadAttention
from lorafast.nn.lora_conv import LoRAConv, LoRAConv1d, LoRAConv2d, LoRAConv3d
from lorafast.nn.lora_embedding import LoRAEmbedding
from lorafast.nn.lora_linear import LoRALinear
from lorafast.nn.quantized_linear import QuantizedLinear
from lorafast.nn.stored_weight import bitsandbytes_keys

__all__ = [
    "AdapterLayer",
    "Bottleneck",
    "Choice",
    "Explanation",
    "LoRAConv",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRAMultiheadAttention",
    "QuantizedLinear",
    "Sharing",
    "bitsandbytes_keys",
    "explain",
]
