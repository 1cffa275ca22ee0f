"""The fast classes of LoRA's relatives over convolutions.

What each computes is in the module of its name, ``convolved`` or ``one_conv``.
"""

from typing import Any

from peft.tuners.adalora import layer as stock_adalora
from peft.tuners.boft import layer as stock_boft
from peft.tuners.loha import layer as stock_loha
from peft.tuners.lokr import layer as stock_lokr
from peft.tuners.oft import layer as stock_oft
from torch import Tensor

from lorafast.integrations.peft import boft, convolved, known, layers, lokr, oft, one_conv
from lorafast.integrations.peft.adalora import ADALORA
from lorafast.integrations.peft.loha import LOHA

_READ = {name: digest for name, digest in known.READ.items() if name != "_check_forward_args"}
_CAST = {"_cast_input_dtype": "accb7f5ac617a435"}
_LYCORIS = {
    1: {"forward": "fe10dc5ed294ccfb", "_get_delta_activations": "192e34ef05f99929"},
    2: {"forward": "fe10dc5ed294ccfb", "_get_delta_activations": "8a65a648d342e9b0"},
}
_LOHA = {"get_delta_weight": "567821d84c32a362"}
_LOKR = {"get_delta_weight": "ccf11fb49c2cc12d"}
METHODS: dict[str, dict[Any, dict[str, str]]] = {
    "AdaLoRA convolution": {
        stock_adalora.SVDConv2d: _READ | _CAST | {"forward": "301218c20ebb831a"}
    },
    "LoHa convolution": {
        stock_loha.Conv1d: _READ | _CAST | _LYCORIS[1] | _LOHA,
        stock_loha.Conv2d: _READ | _CAST | _LYCORIS[2] | _LOHA,
        stock_loha: {"make_weight": "ada10b4910baaaec", "make_weight_cp": "0819c5bbf8f9297d"},
        stock_loha.HadaWeight: {"forward": "dae6a5077e895dc8", "backward": "08637592eb1741da"},
        stock_loha.HadaWeightCP: {"forward": "cbeb80ea52e4f196", "backward": "1402099733c7d70a"},
    },
    "LoKr convolution": {
        stock_lokr.Conv1d: _READ | _CAST | _LYCORIS[1] | _LOKR,
        stock_lokr.Conv2d: _READ | _CAST | _LYCORIS[2] | _LOKR,
        stock_lokr: {"make_kron": "2d1f75160a3f02d1", "make_weight_cp": "5c159a0c8ce4943d"},
    },
    "OFT convolution": {
        stock_oft.Conv2d: _READ | _CAST | {"forward": "3f2d3bc4b7cf3679"},
        stock_oft.OFTRotationModule: {"forward": "7fe6dd676f2dd703"},
    },
    "BOFT convolution": {
        stock_boft.Conv2d: _READ
        | {"forward": "260a02b6695475eb", "get_base_weight": "0424e390eb3bfb84"}
    },
}
"""As ``known.METHODS``, which has them from now on."""
known.METHODS.update(METHODS)
known.UNLIKE.update(
    {
        "BOFT convolution": ("0.19.1",),
        "LoHa convolution": ("0.19.1", "0.20.0"),
        "LoKr convolution": ("0.19.1", "0.20.0"),
    }
)


class AdaLoraConv2d(layers.FastKind, stock_adalora.SVDConv2d):
    """AdaLoRA over ``nn.Conv2d``."""

    _stock = stock_adalora.SVDConv2d

    def computed(self, x: Tensor) -> Tensor | None:
        """``y = conv(x, W + Σ scaling/rank · B·(A ⊙ E)) + bias`` over the active adapters."""
        return convolved.forward(self, x, ADALORA)

    def why_stock(self) -> str | None:
        """As ``FastKind``."""
        return convolved.why_stock(self, ADALORA)


class LohaConv1d(layers.FastKind, stock_loha.Conv1d):
    """LoHa over ``nn.Conv1d``."""

    _stock = stock_loha.Conv1d

    def computed(self, x: Tensor) -> Tensor | None:
        """``y = conv(x, W + Σ scaling · (W₁ₐ·W₁ᵦ) ⊙ (W₂ₐ·W₂ᵦ)) + bias`` over the active adapters."""
        return one_conv.forward(self, x, LOHA.parts(self), LOHA)

    def why_stock(self) -> str | None:
        """As ``FastKind``."""
        return one_conv.why_stock(self, LOHA.parts(self), LOHA)


class LohaConv2d(layers.FastKind, stock_loha.Conv2d):
    """LoHa over ``nn.Conv2d``."""

    _stock = stock_loha.Conv2d

    def computed(self, x: Tensor) -> Tensor | None:
        """``y = conv(x, W + Σ scaling · (W₁ₐ·W₁ᵦ) ⊙ (W₂ₐ·W₂ᵦ)) + bias`` over the active adapters."""
        return one_conv.forward(self, x, LOHA.parts(self), LOHA)

    def why_stock(self) -> str | None:
        """As ``FastKind``."""
        return one_conv.why_stock(self, LOHA.parts(self), LOHA)


class LokrConv1d(layers.FastKind, stock_lokr.Conv1d):
    """LoKr over ``nn.Conv1d``."""

    _stock = stock_lokr.Conv1d

    def computed(self, x: Tensor) -> Tensor | None:
        """``y = conv(x, W + Σ scaling · W₁ ⊗ W₂) + bias`` over the active adapters."""
        return lokr.forward_conv(self, x)

    def why_stock(self) -> str | None:
        """As ``FastKind``."""
        return lokr.why_stock_conv(self)


class LokrConv2d(layers.FastKind, stock_lokr.Conv2d):
    """LoKr over ``nn.Conv2d``."""

    _stock = stock_lokr.Conv2d

    def computed(self, x: Tensor) -> Tensor | None:
        """``y = conv(x, W + Σ scaling · W₁ ⊗ W₂) + bias`` over the active adapters."""
        return lokr.forward_conv(self, x)

    def why_stock(self) -> str | None:
        """As ``FastKind``."""
        return lokr.why_stock_conv(self)


class OftConv2d(layers.FastKind, stock_oft.Conv2d):
    """OFT over an ``nn.Conv2d`` of 1 x 1."""

    _stock = stock_oft.Conv2d

    def computed(self, x: Tensor) -> Tensor | None:
        """``y = conv(x·R, W) + bias`` over the active adapters."""
        return oft.forward_conv(self, x)

    def why_stock(self) -> str | None:
        """As ``FastKind``."""
        return oft.why_stock_conv(self)


class BoftConv2d(layers.FastKind, stock_boft.Conv2d):
    """BOFT over ``nn.Conv2d``."""

    _stock = stock_boft.Conv2d

    def computed(self, x: Tensor) -> Tensor | None:
        """``y = conv(x, s ⊙ (W·Rᵀ)) + bias`` over the active adapters."""
        return boft.forward_conv(self, x)

    def why_stock(self) -> str | None:
        """As ``FastKind``."""
        return boft.why_stock_conv(self)


layers.LAYERS.update(
    {
        stock_adalora.SVDConv2d: "AdaLoRA convolution",
        stock_loha.Conv1d: "LoHa convolution",
        stock_loha.Conv2d: "LoHa convolution",
        stock_lokr.Conv1d: "LoKr convolution",
        stock_lokr.Conv2d: "LoKr convolution",
        stock_oft.Conv2d: "OFT convolution",
        stock_boft.Conv2d: "BOFT convolution",
    }
)
layers.add(AdaLoraConv2d, LohaConv1d, LohaConv2d, LokrConv1d, LokrConv2d, OftConv2d, BoftConv2d)
