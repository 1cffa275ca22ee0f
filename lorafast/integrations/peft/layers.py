"""The fast classes: PEFT's own, but for ``forward``.

A layer is made fast by being given such a class, so that its parameters, its state, its adapters and
everything that PEFT does to them stay what they were. A pickle names PEFT's class: it loads where this
package isn't installed, and what it loads is PEFT's layer.
"""

import copy
import copyreg
from typing import Any, ClassVar

from peft.tuners.lora import layer as stock
from torch import Tensor

from lorafast.integrations.peft import embedding, known, linear


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


class Linear(_Fast, stock.Linear):
    """LoRA over ``nn.Linear`` or ``Conv1D``; ``linear`` says what is computed."""

    _stock = stock.Linear

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``y = x·Wᵀ + Σ scaling · (drop(x)·Aᵀ)·Bᵀ + bias`` over the active adapters."""
        y = linear.forward(self, x, args, kwargs)
        return stock.Linear.forward(self, x, *args, **kwargs) if y is None else y


class Embedding(_Fast, stock.Embedding):
    """LoRA over ``nn.Embedding``; ``embedding`` says what is computed."""

    _stock = stock.Embedding

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``y = W[x] + Σ scaling · Aᵀ[x]·Bᵀ`` over the active adapters."""
        y = embedding.forward(self, x, args, kwargs)
        return stock.Embedding.forward(self, x, *args, **kwargs) if y is None else y


LAYERS: dict[Any, str] = {stock.Linear: "linear", stock.Embedding: "embedding"}
"""PEFT's classes that are stood in for, and their kind."""

FAST = {
    fast._stock: fast
    for fast in (Linear, Embedding)
    if known.why_changed(LAYERS[fast._stock]) is None
}
"""PEFT's class → the fast one."""
