"""The fast classes: PEFT's own, but for ``forward``.

A layer is made fast by being given such a class, so that its parameters, its state, its adapters and
everything that PEFT does to them stay what they were. A pickle names PEFT's class: it loads where this
package isn't installed, and what it loads is PEFT's layer.
"""

import copy
import copyreg
import importlib
from typing import Any, ClassVar

from peft.tuners.lora import layer as stock
from peft.tuners.lora import torchao
from torch import Tensor, nn

from lorafast.integrations.peft import attention, conv, embedding, known, linear, parameters
from lorafast.integrations.peft.quantized import forget_stale
from lorafast.operands import bitsandbytes


class _Fast:
    """What the fast classes share; ``_stock`` is the class of PEFT's that each stands in for."""

    _stock: ClassVar[Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        make = copyreg._reconstructor  # type: ignore[attr-defined]
        return make, (self._stock, object, None), *reduced[2:]

    def __copy__(self) -> Any:
        copied = self._stock.__new__(type(self))
        copied.__setstate__(self.__dict__.copy())
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self)] = self._stock.__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied


class FastLinear(_Fast):
    """LoRA over a linear layer, dense or quantized; ``linear`` says what is computed."""

    mixed_changed: ClassVar[str | None] = known.why_changed("mixed batch")
    """Why PEFT serves its mixed batches whatever they are, or None."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``y = x·Wᵀ + Σ scaling · (drop(x)·Aᵀ)·Bᵀ + bias`` over the active adapters."""
        base = self._modules["base_layer"]  # type: ignore[attr-defined]
        if type(base) is not nn.Linear:
            bitsandbytes.check_codes(base)  # PEFT would multiply by them too
        y = linear.forward(self, x, args, kwargs)
        if y is not None:
            return y
        forget_stale(base)
        served: Tensor = self._stock.forward(self, x, *args, **kwargs)
        return served


class Linear(FastLinear, stock.Linear):
    """LoRA over ``nn.Linear`` or ``Conv1D``."""

    _stock = stock.Linear


class TorchaoLoraLinear(FastLinear, torchao.TorchaoLoraLinear):
    """LoRA over a tensor of torchao's."""

    _stock = torchao.TorchaoLoraLinear


class Embedding(_Fast, stock.Embedding):
    """LoRA over ``nn.Embedding``; ``embedding`` says what is computed."""

    _stock = stock.Embedding

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``y = W[x] + Σ scaling · Aᵀ[x]·Bᵀ`` over the active adapters."""
        y = embedding.forward(self, x, args, kwargs)
        return stock.Embedding.forward(self, x, *args, **kwargs) if y is None else y


class FastConv(_Fast):
    """LoRA over a convolution; ``conv`` says what is computed."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``y = conv(x, W) + Σ scaling · conv(conv(drop(x), A), B) + bias`` over the active adapters."""
        y = conv.forward(self, x, args, kwargs)
        if y is not None:
            return y
        served: Tensor = self._stock.forward(self, x, *args, **kwargs)
        return served


class Conv1d(FastConv, stock.Conv1d):
    """LoRA over ``nn.Conv1d``."""

    _stock = stock.Conv1d


class Conv2d(FastConv, stock.Conv2d):
    """LoRA over ``nn.Conv2d``."""

    _stock = stock.Conv2d


class Conv3d(FastConv, stock.Conv3d):
    """LoRA over ``nn.Conv3d``."""

    _stock = stock.Conv3d


class MultiheadAttention(_Fast, stock.MultiheadAttention):
    """LoRA over ``nn.MultiheadAttention`` and its ``out_proj``; ``attention`` says what is computed."""

    _stock = stock.MultiheadAttention

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False: else PyTorch's encoders hand ``in_proj_weight`` to a fused kernel, past the adapter."""
        return False

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> attention.Result:
        """The arguments of ``nn.MultiheadAttention``; its output, and the attention weights or None."""
        found = attention.forward(self, query, args, kwargs)
        if found is not None:
            return found
        served: attention.Result = stock.MultiheadAttention.forward(self, query, *args, **kwargs)
        return served


class ParamWrapper(_Fast, stock.ParamWrapper):
    """LoRA over a parameter; ``parameters`` says what is computed."""

    _stock = stock.ParamWrapper

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """What the base layer returns where ``W + Σ scaling · ΔW`` stands in for its parameter."""
        found = parameters.forward(self, x, args, kwargs)
        if found is not None:
            return found[0]
        return stock.ParamWrapper.forward(self, x, *args, **kwargs)


LAYERS: dict[Any, str] = {
    stock.Linear: "linear",
    torchao.TorchaoLoraLinear: "torchao linear",
    stock.Embedding: "embedding",
    stock.Conv1d: "convolution",
    stock.Conv2d: "convolution",
    stock.Conv3d: "convolution",
    stock.MultiheadAttention: "attention",
    stock.ParamWrapper: "target_parameters",
}
"""PEFT's classes that are stood in for, and their kind. Those over bitsandbytes' layers are added when
there is one: they import it."""

_ROOMS = {
    "peft.tuners.lora.bnb": "bnb",
    "peft.tuners.adalora.bnb": "family_bnb",
    "peft.tuners.adalora.layer": "family",
    "peft.tuners.boft.layer": "family",
    "peft.tuners.ia3.bnb": "family_bnb",
    "peft.tuners.ia3.layer": "family",
    "peft.tuners.loha.layer": "family",
    "peft.tuners.lokr.layer": "family",
    "peft.tuners.oft.layer": "family",
    "peft.tuners.vera.layer": "family",
}
"""PEFT's modules whose layers have fast classes in a module of their own, imported when one is met."""

FAST: dict[Any, Any] = {}
"""PEFT's class → the fast one."""


class FastKind(_Fast):
    """An adapter of another kind than LoRA over a linear layer."""

    def computed(self, x: Tensor) -> Tensor | None:
        """The layer's output, or None where PEFT serves the call itself."""
        raise NotImplementedError

    def why_stock(self) -> str | None:
        """Why the layer is left to PEFT, whatever its input, as the end of a sentence, or None."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``y [..., N]`` of ``x [..., K]``; arguments that aren't known here are for PEFT."""
        y = None if args or kwargs else self.computed(x)
        if y is not None:
            return y
        forget_stale(self._modules["base_layer"])  # type: ignore[attr-defined]
        served: Tensor = self._stock.forward(self, x, *args, **kwargs)
        return served


def add(*classes: Any) -> None:
    """Makes fast classes known, but those whose methods this release has changed."""
    for fast in classes:
        if known.why_changed(LAYERS[fast._stock]) is None:
            FAST[fast._stock] = fast


def fast_of(kind: Any) -> Any:
    """The fast class that stands in for a class of PEFT's, or None."""
    room = _ROOMS.get(kind.__module__)
    if room is not None:
        importlib.import_module(f"lorafast.integrations.peft.{room}")
    return FAST.get(kind)


add(Linear, TorchaoLoraLinear, Embedding, Conv1d, Conv2d, Conv3d, MultiheadAttention, ParamWrapper)
