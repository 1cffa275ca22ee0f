"""Drop-in modules, and the account of which backend serves them."""

from lorafast.nn.explain import Choice, Explanation, explain
from lorafast.nn.lora_linear import LoRALinear

__all__ = ["Choice", "Explanation", "LoRALinear", "explain"]
