"""The fast classes of (IA)³ and AdaLoRA over layers of bitsandbytes, which importing this imports.

As LoRA's: a 4-bit layer is served in every mode, an 8-bit one in training alone.
"""

import bitsandbytes.nn as own
from peft.tuners.adalora import bnb as stock_adalora
from peft.tuners.ia3 import bnb as stock_ia3
from torch import Tensor

from lorafast.integrations.peft import ia3, known, layers, low_rank
from lorafast.integrations.peft.adalora import ADALORA, ADALORA_8BIT

_READ = {name: digest for name, digest in known.READ.items() if name != "_check_forward_args"}
_CAST = {"_cast_input_dtype": "accb7f5ac617a435"}
_FOUR = {own.Linear4bit: {"forward": "02f875a803b46746", "set_compute_type": "1c210b6a7a39d91b"}}
_EIGHT = {own.Linear8bitLt: {"forward": "3a22adb3b3bdfe90", "init_8bit_state": "f588312f37d89d1b"}}
METHODS = {
    "4-bit (IA)³": {stock_ia3.Linear4bit: _READ | {"forward": "7b6a39e82665421b"}} | _FOUR,
    "8-bit (IA)³": {stock_ia3.Linear8bitLt: _READ | {"forward": "e7aaa245b5e1ec3e"}} | _EIGHT,
    "4-bit AdaLoRA": {stock_adalora.SVDLinear4bit: _READ | _CAST | {"forward": "0d72d32114263ec5"}}
    | _FOUR,
    "8-bit AdaLoRA": {stock_adalora.SVDLinear8bitLt: _READ | {"forward": "668febd91404d222"}}
    | _EIGHT,
}
"""As ``known.METHODS``, which has them from now on."""
known.METHODS.update(METHODS)


class Ia3Linear4bit(layers.FastKind, stock_ia3.Linear4bit):
    """(IA)³ over 4-bit codes."""

    _stock = stock_ia3.Linear4bit

    def computed(self, x: Tensor) -> Tensor | None:
        """``y = l ⊙ (x·Wᵀ + bias)``, feed-forward ``y = (l ⊙ x)·Wᵀ + bias``."""
        return ia3.forward_quantized(self, x)

    def why_stock(self) -> str | None:
        """As ``FastKind``."""
        return ia3.why_stock(self)


class Ia3Linear8bitLt(layers.FastKind, stock_ia3.Linear8bitLt):
    """(IA)³ over 8-bit integers."""

    _stock = stock_ia3.Linear8bitLt

    def computed(self, x: Tensor) -> Tensor | None:
        """``y = l ⊙ (x·Wᵀ + bias)``, feed-forward ``y = (l ⊙ x)·Wᵀ + bias``."""
        return ia3.forward_quantized(self, x)

    def why_stock(self) -> str | None:
        """As ``FastKind``."""
        return ia3.why_stock(self)


class AdaLoraLinear4bit(layers.FastKind, stock_adalora.SVDLinear4bit):
    """AdaLoRA over 4-bit codes."""

    _stock = stock_adalora.SVDLinear4bit

    def computed(self, x: Tensor) -> Tensor | None:
        """``y = x·Wᵀ + Σ scaling/rank · ((drop(x)·Aᵀ) ⊙ E)·Bᵀ + bias`` over the active adapters."""
        return low_rank.forward(self, x, ADALORA)

    def why_stock(self) -> str | None:
        """As ``FastKind``."""
        return low_rank.why_stock(self, ADALORA)


class AdaLoraLinear8bitLt(layers.FastKind, stock_adalora.SVDLinear8bitLt):
    """AdaLoRA over 8-bit integers."""

    _stock = stock_adalora.SVDLinear8bitLt

    def computed(self, x: Tensor) -> Tensor | None:
        """``y = x·Wᵀ + Σ scaling/rank · ((drop(x)·Aᵀ) ⊙ E)·Bᵀ + bias`` over the active adapters."""
        return low_rank.forward(self, x, ADALORA_8BIT)

    def why_stock(self) -> str | None:
        """As ``FastKind``."""
        return low_rank.why_stock(self, ADALORA_8BIT)


layers.LAYERS.update(
    {
        stock_ia3.Linear4bit: "4-bit (IA)³",
        stock_ia3.Linear8bitLt: "8-bit (IA)³",
        stock_adalora.SVDLinear4bit: "4-bit AdaLoRA",
        stock_adalora.SVDLinear8bitLt: "8-bit AdaLoRA",
    }
)
layers.add(Ia3Linear4bit, Ia3Linear8bitLt, AdaLoraLinear4bit, AdaLoraLinear8bitLt)
