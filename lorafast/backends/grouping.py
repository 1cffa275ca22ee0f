"""How the elements of a batch stand together by adapter, for one batched product over all adapters.

The elements of an adapter fill groups of ``size`` slots; all slots of a group have one adapter. A slot
that is left over holds some element again: its rows are computed and dropped, and where rows are summed
they are zero first, for a NaN or an infinity of one adapter must reach no sum of another.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafast.core.assignment import Assignment
from lorafast.core.transfer import on_device

_PARTS = 4
"""Groups per adapter where the host doesn't know how many each fills: a quarter more slots than elements
serve every assignment."""


@dataclass(frozen=True)
class Grouping(ABC):
    """``groups · size`` slots. ``taken [groups · size]``: the element in each slot; None: all elements
    in order. ``adapter [groups]``: whose a group is; None: group i is of adapter i."""

    groups: int
    size: int
    taken: Tensor | None
    adapter: Tensor | None

    def of_groups(self, factors: Tensor) -> Tensor:
        """``[n, …]`` by adapter → ``[groups, …]``."""
        return factors if self.adapter is None else factors.index_select(0, self.adapter)

    def gathered(self, elements: Tensor) -> Tensor:
        """``[E, T, C]`` → ``[groups, size · T, C]``, whatever is left over filled up."""
        _, T, C = elements.shape
        if self.taken is not None:
            elements = elements.index_select(0, self.taken)
        return elements.reshape(self.groups, self.size * T, C)

    def blanked(self, slots: Tensor, T: int) -> Tensor:
        """``[groups, size · T, C]`` with zeros in what is left over; written in place."""
        self._blank(self._each(slots, T))
        return slots

    def added(self, elements: Tensor, slots: Tensor) -> Tensor:
        """``elements [E, T, C]`` plus ``slots [groups, size · T, C]``; written in place."""
        return self._add(elements, self._each(slots, elements.shape[1]))

    def scattered(self, slots: Tensor, T: int) -> Tensor:
        """``[groups, size · T, C]`` → ``[E, T, C]``, zeros where an element has no adapter."""
        return self._scatter(self._each(slots, T))

    def summed(self, groups: Tensor, adapters: int) -> Tensor:
        """``[groups, …]`` → ``[adapters, …]``, the sum over each adapter's groups, in one order."""
        owner = self._owner()
        if owner is None:
            return groups
        sums = groups.new_zeros((adapters + 1, *groups.shape[1:]))
        if groups.is_cuda:  # where index_add_ adds in whatever order, and this sorts first
            sums.index_put_((owner,), groups, accumulate=True)
        else:
            sums.index_add_(0, owner, groups)
        return sums[:adapters]

    def _owner(self) -> Tensor | None:
        """As ``adapter``; one more than there are where a group is nobody's."""
        return self.adapter

    def _each(self, slots: Tensor, T: int) -> Tensor:
        """By slot: ``[groups · size, T, C]``."""
        return slots.view(self.groups * self.size, T, slots.shape[-1])

    @abstractmethod
    def _blank(self, each: Tensor) -> None: ...

    @abstractmethod
    def _add(self, elements: Tensor, each: Tensor) -> Tensor: ...

    @abstractmethod
    def _scatter(self, each: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class _Known(Grouping):
    """Of an assignment that the host knows. ``elements``: how many; ``rows``: those that have an
    adapter; ``kept``: the slots that they fill, None: all; ``left``: the others."""

    elements: int
    rows: Tensor
    kept: Tensor | None
    left: Tensor | None

    def _blank(self, each: Tensor) -> None:
        if self.left is not None:
            each.index_fill_(0, self.left, 0.0)

    def _add(self, elements: Tensor, each: Tensor) -> Tensor:
        if self.taken is None:
            return elements.add_(each)
        return elements.index_add_(0, self.rows, self._without_left(each))

    def _scatter(self, each: Tensor) -> Tensor:
        if self.taken is None:
            return each
        zeros = each.new_zeros((self.elements, *each.shape[1:]))
        return zeros.index_copy_(0, self.rows, self._without_left(each))

    def _without_left(self, each: Tensor) -> Tensor:
        return each if self.kept is None else each.index_select(0, self.kept)


@dataclass(frozen=True)
class _Unknown(Grouping):
    """Of an assignment that the device alone knows. ``slot [E]``: that of each element; ``none [E]``:
    whether it has none; ``left [groups · size]``: whether a slot is left over; ``owner [groups]``: as
    ``adapter``, which is any where a group is nobody's."""

    owner: Tensor
    slot: Tensor
    none: Tensor
    left: Tensor

    def _owner(self) -> Tensor:
        return self.owner

    def _blank(self, each: Tensor) -> None:
        each.masked_fill_(self.left.view(-1, 1, 1), 0.0)

    def _add(self, elements: Tensor, each: Tensor) -> Tensor:
        return elements.add_(self._scatter(each))

    def _scatter(self, each: Tensor) -> Tensor:
        return each.index_select(0, self.slot).masked_fill_(self.none.view(-1, 1, 1), 0.0)


def group(assignment: Assignment, adapters: int, device: torch.device) -> Grouping | None:
    """The grouping of an assignment to ``adapters`` adapters; None if it is known that none is used.

    An index that is out of range is none.
    """
    adapter_of = assignment.adapter_of
    if isinstance(adapter_of, Tensor):
        return on_the_device(adapter_of, adapters)
    return _on_the_host(adapter_of, adapters, device)


def _on_the_host(adapter_of: list[int], adapters: int, device: torch.device) -> Grouping | None:
    """No group is larger than the average of the adapters that are used: what is left over is less than
    the elements."""
    elements: dict[int, list[int]] = {}
    for i, g in enumerate(adapter_of):
        if 0 <= g < adapters:
            elements.setdefault(g, []).append(i)
    if not elements:
        return None
    size = -(-sum(map(len, elements.values())) // len(elements))
    lists: tuple[list[int], ...] = ([], [], [], [], [])
    adapter, taken, rows, kept, left = lists
    for g in sorted(elements):
        own = elements[g]
        rows += own
        for begin in range(0, len(own), size):
            part = own[begin : begin + size]
            first, missing = len(taken), size - len(part)
            adapter.append(g)
            kept += range(first, first + len(part))
            left += range(first + len(part), first + size)
            taken += [*part, *part[:1] * missing]
    # One copy to the device, not five.
    indices = on_device([i for some in lists for i in some], torch.int64, device)
    of_adapter, of_taken, of_rows, of_kept, of_left = indices.split([len(some) for some in lists])
    return _Known(
        len(adapter),
        size,
        None if taken == list(range(len(adapter_of))) else of_taken,
        None if adapter == list(range(adapters)) else of_adapter,
        len(adapter_of),
        of_rows,
        of_kept if left else None,
        of_left if left else None,
    )


def on_the_device(adapter_of: Tensor, adapters: int) -> Grouping | None:
    """The same by operations whose shapes depend on no value: ``adapter_of [E]`` int64."""
    E, device = adapter_of.shape[0], adapter_of.device
    if not E or not adapters:
        return None
    used = min(adapters, E)
    size = -(-E // (_PARTS * used))
    groups = (E + used * (size - 1)) // size  # however the elements are assigned, they fit
    none = (adapter_of < 0) | (adapter_of >= adapters)
    key = adapter_of.masked_fill(none, adapters)
    ordered, order = torch.sort(key, stable=True)
    begin = torch.searchsorted(ordered, torch.arange(adapters + 1, device=device))  # [n + 1]
    count = begin.diff()
    filled = (count + (size - 1)) // size  # groups of each adapter
    end = filled.cumsum(0)
    first = torch.cat([end - filled, end[-1:]])  # [n + 1]

    group_of = torch.arange(groups, device=device)
    owner = torch.searchsorted(end, group_of, right=True)  # n: nobody
    place = (group_of - first[owner]).unsqueeze(1) * size + torch.arange(size, device=device)
    count = torch.cat([count, count.new_zeros(1)])
    left = place >= count[owner].unsqueeze(1)  # [groups, size]
    taken = order[(begin[owner].unsqueeze(1) + place).masked_fill(left, 0)]

    rank = torch.empty_like(order).scatter_(0, order, torch.arange(E, device=device))
    slot = first[key] * size + rank - begin[key]
    return _Unknown(
        groups,
        size,
        taken.flatten(),
        owner.clamp(max=adapters - 1),
        owner,
        slot.masked_fill(none, 0),
        none,
        left.flatten(),
    )
