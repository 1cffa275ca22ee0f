"""The fast classes of LoRA's relatives over linear layers, and with ``family_conv`` over convolutions.

What each computes is in the module of its name: ``vera``, ``adalora``, ``ia3``, ``loha``, ``lokr``,
``oft``, ``boft``.
"""

from typing import Any

from peft.tuners.adalora import layer as stock_adalora
from peft.tuners.boft import layer as stock_boft
from peft.tuners.ia3 import layer as stock_ia3
from peft.tuners.loha import layer as stock_loha
from peft.tuners.lokr import layer as stock_lokr
from peft.tuners.oft import layer as stock_oft
from peft.tuners.vera import layer as stock_vera
from torch import Tensor

from lorafast.integrations.peft import boft, family_conv, ia3, known, layers, lokr, low_rank, oft
from lorafast.integrations.peft.adalora import ADALORA
from lorafast.integrations.peft.loha import LOHA
from lorafast.integrations.peft.vera import VERA

_READ = {name: digest for name, digest in known.READ.items() if name != "_check_forward_args"}
_CAST = {"_cast_input_dtype": "accb7f5ac617a435"}
METHODS: dict[str, dict[Any, dict[str, str]]] = {
    "VeRA": {stock_vera.Linear: _READ | _CAST | {"forward": "6fd6ad5845f3e00b"}},
    "AdaLoRA": {stock_adalora.SVDLinear: _READ | _CAST | {"forward": "fc3b15fdecb3db2a"}},
    "(IA)³": {stock_ia3.Linear: _READ | {"forward": "db1148aafb96c29c"}},
    "OFT": {
        stock_oft.Linear: _READ | _CAST | {"forward": "3f2d3bc4b7cf3679"},
        stock_oft.OFTRotationModule: {"forward": "7fe6dd676f2dd703"},
    },
    "BOFT": {stock_boft.Linear: _READ | {"forward": "8dd152cef74c783b"}},
    "LoHa": {
        stock_loha.Linear: _READ
        | _CAST
        | {
            "forward": "fe10dc5ed294ccfb",
            "get_delta_weight": "567821d84c32a362",
            "_get_delta_activations": "d52282c98bc5a00b",
        },
        stock_loha: {"make_weight": "ada10b4910baaaec"},
        stock_loha.HadaWeight: {"forward": "dae6a5077e895dc8", "backward": "08637592eb1741da"},
    },
    "LoKr": {
        stock_lokr.Linear: _READ
        | _CAST
        | {
            "forward": "fe10dc5ed294ccfb",
            "get_delta_weight": "ccf11fb49c2cc12d",
            "_get_delta_activations": "d52282c98bc5a00b",
        },
        stock_lokr: {"make_kron": "2d1f75160a3f02d1"},
    },
}
"""As ``known.METHODS``, which has them from now on."""
CONVOLUTIONS = family_conv.METHODS
"""The same of convolutions."""
known.METHODS.update(METHODS)
known.UNLIKE.update(
    {
        "BOFT": ("0.19.1",),
        "LoHa": ("0.19.1", "0.20.0"),
        "LoKr": ("0.19.1", "0.20.0"),
        "VeRA": ("0.19.1",),
    }
)


class VeraLinear(layers.FastKind, stock_vera.Linear):
    """VeRA over a linear layer, dense or quantized."""

    _stock = stock_vera.Linear

    def computed(self, x: Tensor) -> Tensor | None:
        """``y = x·Wᵀ + Σ λ_b ⊙ ((drop(x)·Aᵀ) ⊙ λ_d)·Bᵀ + bias`` over the active adapters."""
        return low_rank.forward(self, x, VERA)

    def why_stock(self) -> str | None:
        """As ``FastKind``."""
        return low_rank.why_stock(self, VERA)


class AdaLoraLinear(layers.FastKind, stock_adalora.SVDLinear):
    """AdaLoRA over a dense linear layer."""

    _stock = stock_adalora.SVDLinear

    def computed(self, x: Tensor) -> Tensor | None:
        """``y = x·Wᵀ + Σ scaling/rank · ((drop(x)·Aᵀ) ⊙ E)·Bᵀ + bias`` over the active adapters."""
        return low_rank.forward(self, x, ADALORA)

    def why_stock(self) -> str | None:
        """As ``FastKind``."""
        return low_rank.why_stock(self, ADALORA)


class LohaLinear(layers.FastKind, stock_loha.Linear):
    """LoHa over a dense linear layer."""

    _stock = stock_loha.Linear

    def computed(self, x: Tensor) -> Tensor | None:
        """``y = x·(W + Σ scaling · (W₁ₐ·W₁ᵦ) ⊙ (W₂ₐ·W₂ᵦ))ᵀ + bias`` over the active adapters."""
        return low_rank.forward(self, x, LOHA)

    def why_stock(self) -> str | None:
        """As ``FastKind``."""
        return low_rank.why_stock(self, LOHA)


class LokrLinear(layers.FastKind, stock_lokr.Linear):
    """LoKr over a dense linear layer."""

    _stock = stock_lokr.Linear

    def computed(self, x: Tensor) -> Tensor | None:
        """``y = x·(W + Σ scaling · W₁ ⊗ W₂)ᵀ + bias`` over the active adapters."""
        return lokr.forward(self, x)

    def why_stock(self) -> str | None:
        """As ``FastKind``."""
        return lokr.why_stock(self)


class Ia3Linear(layers.FastKind, stock_ia3.Linear):
    """(IA)³ over a dense linear layer."""

    _stock = stock_ia3.Linear

    def computed(self, x: Tensor) -> Tensor | None:
        """``y = l ⊙ (x·Wᵀ + bias)``, feed-forward ``y = (l ⊙ x)·Wᵀ + bias``."""
        return ia3.forward(self, x)

    def why_stock(self) -> str | None:
        """As ``FastKind``."""
        return ia3.why_stock(self)


class OftLinear(layers.FastKind, stock_oft.Linear):
    """OFT over a linear layer, dense or quantized."""

    _stock = stock_oft.Linear

    def computed(self, x: Tensor) -> Tensor | None:
        """``y = (x·diag(R_1 … R_b))·Wᵀ + bias``; several adapters rotate one after another."""
        return oft.forward(self, x)

    def why_stock(self) -> str | None:
        """As ``FastKind``."""
        return oft.why_stock(self)


class BoftLinear(layers.FastKind, stock_boft.Linear):
    """BOFT over a linear layer, dense or quantized."""

    _stock = stock_boft.Linear

    def computed(self, x: Tensor) -> Tensor | None:
        """``y = s ⊙ ((x·R)·Wᵀ) + bias``, R a product of butterflies."""
        return boft.forward(self, x)

    def why_stock(self) -> str | None:
        """As ``FastKind``."""
        return boft.why_stock(self)


layers.LAYERS.update(
    {
        stock_vera.Linear: "VeRA",
        stock_adalora.SVDLinear: "AdaLoRA",
        stock_loha.Linear: "LoHa",
        stock_lokr.Linear: "LoKr",
        stock_ia3.Linear: "(IA)³",
        stock_oft.Linear: "OFT",
        stock_boft.Linear: "BOFT",
    }
)
layers.add(VeraLinear, AdaLoraLinear, LohaLinear, LokrLinear, Ia3Linear, OftLinear, BoftLinear)
