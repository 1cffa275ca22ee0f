"""The collectives of a block of code, counted at the dispatcher: how many of each kind, and their bytes.

Those of tensor parallelism are PyTorch's functional ones, those of FSDP2 and DDP are of ``c10d``. FSDP2
and DDP send from threads and hooks that a mode sees as it sees all else; what a library sends past
PyTorch's dispatcher is not seen.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GATHER, SCATTER, REDUCE = "all_gather", "reduce_scatter", "all_reduce"
_KINDS = {
    "all_reduce": REDUCE, "all_reduce_coalesced": REDUCE, "allreduce_": REDUCE,
    "allreduce_coalesced_": REDUCE, "all_gather_into_tensor": GATHER,
    "all_gather_into_tensor_coalesced": GATHER, "_allgather_base_": GATHER,
    "allgather_into_tensor_coalesced_": GATHER, "reduce_scatter_tensor": SCATTER,
    "reduce_scatter_tensor_coalesced": SCATTER, "_reduce_scatter_base_": SCATTER,
    "reduce_scatter_tensor_coalesced_": SCATTER, "broadcast": "broadcast", "broadcast_": "broadcast",
    "all_to_all_single": "all_to_all", "alltoall_base_": "all_to_all", "scatter_": "scatter",
    "allgather_": GATHER, "reduce_scatter_": SCATTER,
}  # fmt: skip
_NAMESPACES = {"_c10d_functional", "c10d", "_c10d_functional_autograd"}


@dataclass(frozen=True)
class Collective:
    """One call of this rank."""

    kind: str
    shape: tuple[int, ...]
    """Of the largest tensor: what is reduced, what is gathered, what is scattered."""
    dtype: torch.dtype
    bytes: int
    """Of that tensor, or of all of them."""
    backward: bool
    """Whether a backward called it."""
    ranks: tuple[int, ...]
    """Who takes part."""

    @property
    def sent(self) -> float:
        """Bytes that this rank sends in a ring of p: (p − 1) / p of the tensor, twice to reduce."""
        p = len(self.ranks)
        return self.bytes * (p - 1) / p * (2 if self.kind == REDUCE else 1)


class Collectives(TorchDispatchMode):
    """A context manager: ``calls`` has what was called within the block, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(hasattr(kind, "full_tensor") for kind in types):
            return NotImplemented  # a DTensor's own operations come here next
        made = func(*args, **(kwargs or {}))
        namespace, _, name = getattr(func, "_qualified_op_name", func.name()).partition("::")
        name = name.partition(".")[0]
        if namespace in _NAMESPACES and name in _KINDS:
            leaves = tree_leaves((args, kwargs, made))
            tensors = [t for t in leaves if isinstance(t, Tensor)]
            self._count(_KINDS[name], tensors, _ranks_of(leaves))
        return made

    def _count(self, kind: str, tensors: list[Tensor], ranks: tuple[int, ...]) -> None:
        largest = max(tensors, key=lambda t: t.numel())
        backward = torch._C._current_graph_task_id() != -1
        size = largest.numel() * largest.element_size()
        shape = tuple(largest.shape)
        self.calls.append(Collective(kind, shape, largest.dtype, size, backward, ranks))

    def counts(self, *, backward: bool | None = None) -> dict[str, int]:
        """How many of each kind, in forwards or backwards alone if that is given."""
        return dict(Counter(one.kind for one in self._of(backward)))

    def bytes(self, *, backward: bool | None = None) -> dict[str, int]:
        """The bytes of each kind."""
        found: Counter[str] = Counter()
        for one in self._of(backward):
            found[one.kind] += one.bytes
        return dict(found)

    def table(self) -> list[tuple[Collective, int]]:
        """Equal ones together, with how many there were, in the order of the first."""
        return list(Counter(self.calls).items())

    def sent(self, node: int | None = None) -> float:
        """Bytes that this rank has sent, in rings; with ``node`` in groups that leave a node of so many
        ranks alone."""
        return sum(one.sent for one in self.calls if node is None or not _within(one.ranks, node))

    def _of(self, backward: bool | None) -> list[Collective]:
        return [one for one in self.calls if backward is None or one.backward == backward]


def _ranks_of(leaves: Iterable[Any]) -> tuple[int, ...]:
    """The ranks of the group among a call's arguments: its name, or itself."""
    for one in leaves:
        if isinstance(one, str) and one in _names():
            name: Any = one
            return tuple(dist.get_process_group_ranks(c10d._resolve_process_group(name)))
        if isinstance(one, torch.ScriptObject) and "ProcessGroup" in str(one._type()):
            return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(one)))
    return tuple(range(dist.get_world_size()))


def _names() -> set[str]:
    return set(c10d._world.pg_names.values())


def _within(ranks: tuple[int, ...], node: int) -> bool:
    return len({rank // node for rank in ranks}) == 1
