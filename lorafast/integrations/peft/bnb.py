"""The fast classes over layers of bitsandbytes. Importing this imports bitsandbytes.

A ``lora.Linear4bit`` is served in every mode, a ``lora.Linear8bitLt`` in training: in eval mode
bitsandbytes multiplies 8-bit integers, and that is left to it.
"""

from typing import Any

import bitsandbytes.nn as own
from peft.tuners.lora import bnb as stock

from lorafast.integrations.peft import known, layers

_MIXED = {"_mixed_batch_forward": "34c6eec06d32b429"}
_CAST = {"_cast_input_dtype": "accb7f5ac617a435"}
METHODS: dict[str, dict[Any, dict[str, str]]] = {
    "4-bit linear": {
        stock.Linear4bit: known.READ | _CAST | {"forward": "9e1677c392e31fa2"},
        own.Linear4bit: {"forward": "02f875a803b46746", "set_compute_type": "1c210b6a7a39d91b"},
    },
    "4-bit mixed batch": {stock.Linear4bit: _MIXED},
    "8-bit linear": {
        stock.Linear8bitLt: known.READ | _CAST | {"forward": "bf535b82dd7f0e04"},
        own.Linear8bitLt: {"forward": "3a22adb3b3bdfe90", "init_8bit_state": "f588312f37d89d1b"},
    },
    "8-bit mixed batch": {stock.Linear8bitLt: _MIXED},
}
"""As ``known.METHODS``, which has them from now on."""
known.METHODS.update(METHODS)


class Linear4bit(layers.FastLinear, stock.Linear4bit):
    """LoRA over 4-bit codes, NF4 or FP4 (QLoRA)."""

    _stock = stock.Linear4bit
    mixed_changed = known.why_changed("4-bit mixed batch")


class Linear8bitLt(layers.FastLinear, stock.Linear8bitLt):
    """LoRA over 8-bit integers."""

    _stock = stock.Linear8bitLt
    mixed_changed = known.why_changed("8-bit mixed batch")


layers.LAYERS[stock.Linear4bit] = "4-bit linear"
layers.LAYERS[stock.Linear8bitLt] = "8-bit linear"
layers.add(Linear4bit, Linear8bitLt)
