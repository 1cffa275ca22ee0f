"""Mixed batches beyond linear layers: what each element of a batch adds by an adapter of its own.

PEFT copies an adapter's elements out of the output, makes all that is added to them, and copies the sum
back. Here ``s``, of the rank's size, is made adapter by adapter, and one batched product adds to the
output of the whole batch.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafast.core.context import without_autocast
from lorafast.core.transfer import on_device
from lorafast.ops.lora_embedding import sum_dtype

Elements = dict[str, list[int]]
"""The places of an adapter's elements in the batch, by its name."""


def elements_of(names: Sequence[str], adapters: Sequence[str]) -> Elements:
    """The elements of those ``adapters`` that have one; the others of ``names`` have no adapter."""
    found: Elements = {name: [] for name in dict.fromkeys(names) if name in adapters}
    for place, name in enumerate(names):
        if name in found:
            found[name].append(place)
    return found


def shrunk(x: Tensor, elements: Elements, shrink: Callable[[str, Tensor], Tensor]) -> Tensor:
    """``s [batch, r, ...]``, ``shrink(name, x of its elements)`` for each adapter.

    Zeros fill up to the largest rank, and stand for the elements that have no adapter.
    """
    parts, places = [], []
    for name, own in elements.items():
        whole = len(own) == len(x)
        parts.append(shrink(name, x if whole else x[on_device(own, torch.int64, x.device)]))
        places += own
    r = max(part.shape[1] for part in parts)
    rows = torch.cat([_filled(part, 1, r) for part in parts])
    if places == list(range(len(x))):
        return rows
    index = on_device(places, torch.int64, x.device)
    return rows.new_zeros(len(x), *rows.shape[1:]).index_copy(0, index, rows)


def expanding(elements: Elements, batch: int, every_B: dict[str, Tensor]) -> Tensor:
    """``B [batch, N, r]`` from the ``B [N, r]`` of each adapter, as ``shrunk`` fills up."""
    r = max(B.shape[-1] for B in every_B.values())
    filled = {name: _filled(B, -1, r) for name, B in every_B.items()}
    none = torch.zeros_like(next(iter(filled.values())))
    of_element = {place: filled[name] for name, own in elements.items() for place in own}
    # Not picked from a table: the gradient of that would be a sum in whatever order.
    return torch.stack([of_element.get(place, none) for place in range(batch)])


def added(y: Tensor, s: Tensor, B: Tensor) -> Tensor:
    """``y + s·B`` of each element: ``y [batch, M, N]``, ``s [batch, M, r]``, ``B [batch, r, N]``."""
    dtype = sum_dtype(y, B)
    with without_autocast(y):
        return torch.baddbmm(y.to(dtype), s.to(dtype), B.to(dtype)).to(y.dtype)


def _filled(tensor: Tensor, dim: int, r: int) -> Tensor:
    """``tensor`` with zeros behind it, up to ``r`` along ``dim``."""
    missing = r - tensor.shape[dim]
    if not missing:
        return tensor
    after = tensor.dim() - 1 - dim % tensor.dim()
    return F.pad(tensor, (*[0] * (2 * after), 0, missing))
