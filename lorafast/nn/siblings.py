"""``Siblings``: layers that a module calls with the same x, and what they share of it."""

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lorafast.ops.siblings import Shared, Sibling, can_share


class Siblings:
    """LoRA layers of one parent which it calls with the same x, in any order: q, k and v; gate and up.

    The first that is called with an x makes what all of them need of it; each of the others takes its
    part when it is called with the same tensor, unchanged. A layer that is called with another x is
    served as if it were alone, and so is a call that can't share: see ``ops.siblings.can_share``.

    It holds its layers weakly. A copy or a pickle of it has places for as many, which the layers that
    are copied with it take.
    """

    __slots__ = ("__weakref__", "_kept", "_layers", "_shared")

    def __init__(self, count: int) -> None:
        self._layers: list[weakref.ref[Any] | None] = [None] * count
        self._shared: weakref.ref[Shared] | None = None
        self._kept: Shared | None = None

    def __reduce__(self) -> tuple[type["Siblings"], tuple[int]]:
        return Siblings, (len(self._layers),)

    def join(self, index: int, layer: Any) -> bool:
        """Gives ``layer`` the place ``index``; False if another has it."""
        there = self._layers[index]
        if there is not None and there() not in (None, layer):
            return False
        self._layers[index] = weakref.ref(layer)
        return True

    def layers(self) -> list[Any]:
        """Those that there are."""
        found = (there() for there in self._layers if there is not None)
        return [layer for layer in found if layer is not None]

    def forward(self, index: int, layer: Any, x: Tensor) -> Tensor | None:
        """``layer(x)`` by what the siblings share of ``x``; None if it is to be served alone."""
        there = self._layers[index]
        if there is None or there() is not layer or not can_share(x):
            return None
        own = layer.sibling()
        if own is None:
            return None
        shared = None if self._shared is None else self._shared()
        if shared is None or not shared.is_of(x):
            shared = self._share(layer, own, x)
        if shared is None or not shared.has(layer, own):
            return None
        y = shared.take(layer, x)
        if shared.is_used_up:
            self._shared = self._kept = None
        return y

    def _share(self, layer: Any, own: Sibling, x: Tensor) -> Shared | None:
        """What is shared of ``x`` by ``layer`` and those of the others that fit it."""
        self._shared = self._kept = None
        if not own.fits(x, own):
            return None
        found = {layer: own}
        for other in self.layers():
            its = None if other is layer else other.sibling()
            if its is not None and its.fits(x, own):
                found[other] = its
        if len(found) < 2:
            return None
        shared = Shared(x, found)
        self._shared = weakref.ref(shared)
        # Where there is a graph, the nodes of y hold it, and nothing else keeps what they saved.
        self._kept = None if shared.has_graph else shared
        return shared


def tie(layers: Sequence[Any]) -> None:
    """Makes siblings of ``layers``, which belong to no others."""
    group = Siblings(len(layers))
    for index, layer in enumerate(layers):
        layer.set_siblings((group, index))
