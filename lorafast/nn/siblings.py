"""``Siblings``: layers that a module calls with the same x, and what they share of it."""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lorafast.core.context import without_autocast
from lorafast.ops.siblings import Shared, Sibling, can_share, is_recorded

_ENOUGH = 2
"""Times in a row that a layer leaves its part, after which none is made for it."""
_TRIED_AGAIN = 32
"""Of so many times that a layer is the first, one is for all of them, whatever they left before."""


class Siblings:
    """LoRA layers of one parent which it calls with the same x, in any order: q, k and v; gate and up.

    The first that is called with an x makes what all of them need of it; each of the others takes its
    part when it is called with the same tensor, unchanged. A layer that is called with another x is
    served as if it were alone, and so is a call that can't share: see ``ops.siblings.can_share``.
    A layer that comes a second time with the same x begins anew.

    A change of ``x`` or ``lora_A`` that PyTorch doesn't count, as ``lora_A.data.mul_(2)``, can't be seen
    between the calls of two siblings: the second takes what was made before it.

    It holds its layers weakly. A copy or a pickle of it has places for as many, which the layers that
    are copied with it take.
    """

    __slots__ = ("__weakref__", "_kept", "_last", "_layers", "_missed", "_opened", "_shared")

    def __init__(self, count: int) -> None:
        self._layers: list[weakref.ref[Any] | None] = [None] * count
        self._shared: weakref.ref[Shared] | None = None
        self._kept: Shared | None = None
        self._last: tuple[tuple[int, ...], dict[int, int]] = ((), {})
        """For whom something was made last, and who of them has left it so far."""
        self._opened = [0] * count
        """How often each place was the first that an x came to."""
        self._missed: dict[tuple[int, int], int] = {}
        """How often in a row the second place left what the first had made for it."""

    def __reduce__(self) -> tuple[type["Siblings"], tuple[int]]:
        return Siblings, (len(self._layers),)

    def __len__(self) -> int:
        """Places."""
        return len(self._layers)

    def join(self, place: int, layer: Any) -> bool:
        """Gives ``layer`` a place; False if another has it."""
        if self._at(place) not in (None, layer):
            return False
        self._layers[place] = weakref.ref(layer)
        return True

    def forward(self, place: int, layer: Any, x: Tensor) -> Tensor | None:
        """``layer(x)`` by what the siblings share of ``x``; None if it is to be served alone."""
        able = can_share(x)
        own = layer.sibling() if able and self._at(place) is layer else None
        if own is None:
            if not able or self._has_part(place):
                self._shared = self._kept = None
            return None
        with without_autocast(x):
            shared = None if self._shared is None else self._shared()
            if shared is None or not shared.is_of(x) or shared.was_taken(place):
                shared = self._share(place, own, x)
            if shared is None or not shared.has(place, own):
                return None
            y = shared.take(place, x)
        if not shared.left:
            self._shared = self._kept = None
        return y

    def _has_part(self, place: int) -> bool:
        """Whether what is shared was made for the layer at ``place`` too, taken or not."""
        shared = None if self._shared is None else self._shared()
        return shared is not None and place in shared.keys

    def _at(self, place: int) -> Any:
        there = self._layers[place]
        return None if there is None else there()

    def _share(self, place: int, own: Sibling, x: Tensor) -> Shared | None:
        """What is shared of ``x`` by the layer at ``place`` and those of the others that fit it."""
        self._shared = self._kept = None
        self._learn()
        if not own.fits(x, own):
            return None
        self._opened[place] += 1
        # What is computed again in a backward must be shared by the same layers then.
        all_of_them = is_recorded() or self._opened[place] % _TRIED_AGAIN == 0
        found = {place: own}
        for other in range(len(self._layers)):
            layer = self._at(other)
            likely = all_of_them or self._missed.get((place, other), 0) < _ENOUGH
            its = layer.sibling() if layer is not None and other != place and likely else None
            if its is not None and its.fits(x, own):
                found[other] = its
        if len(found) < 2:
            return None
        shared = Shared(x, found)
        self._shared, self._last = weakref.ref(shared), (shared.keys, shared.left)
        # Where there is a graph, the nodes of y hold it, and nothing else keeps what they saved.
        self._kept = None if shared.has_graph else shared
        return shared

    def _learn(self) -> None:
        """Who took what was made last: in cross attention k and v leave what q has made."""
        keys, left = self._last
        self._last = (), {}
        for other in keys[1:]:
            missed = self._missed.get((keys[0], other), 0) + 1
            self._missed[keys[0], other] = missed if other in left else 0


def tie(layers: Sequence[Any]) -> None:
    """Makes siblings of ``layers``, which belong to no others."""
    group = Siblings(len(layers))
    for place, layer in enumerate(layers):
        layer.set_siblings((group, place))


def groups(named: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those of the named layers that are siblings of one another, by name and in their places."""
    found: dict[Siblings, list[tuple[int, str, Any]]] = {}
    for name, layer in named.items():
        if layer._siblings is not None:
            group, place = layer._siblings
            found.setdefault(group, []).append((place, name, layer))
    placed = [sorted(group, key=lambda one: one[0]) for group in found.values()]
    return [{name: layer for _, name, layer in group} for group in placed if len(group) > 1]


def short(names: Sequence[str]) -> list[str]:
    """``q`` and ``k`` of ``block.q`` and ``block.k``: the names without the parents of all of them."""
    paths = [name.split(".") for name in names]
    shared = next(
        (i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), 0
    )
    return [".".join(path[shared:]) for path in paths]
