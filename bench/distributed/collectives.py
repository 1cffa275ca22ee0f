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

    def sent(self, ranks: int) -> float:
        """Bytes that each of ``ranks`` sends in a ring: (p − 1) / p of the tensor, twice to reduce."""
        return self.bytes * (ranks - 1) / ranks * (2 if self.kind == REDUCE else 1)


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
            self._count(
                _KINDS[name], [t for t in tree_leaves((args, made)) if isinstance(t, Tensor)]
            )
        return made

    def _count(self, kind: str, tensors: list[Tensor]) -> None:
        largest = max(tensors, key=lambda t: t.numel())
        backward = torch._C._current_graph_task_id() != -1
        size = largest.numel() * largest.element_size()
        shape = tuple(largest.shape)
        self.calls.append(Collective(kind, shape, largest.dtype, size, backward))

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

    def sent(self, ranks: int) -> float:
        """Bytes that each of ``ranks`` has sent, in rings."""
        return sum(one.sent(ranks) for one in self.calls)

    def _of(self, backward: bool | None) -> list[Collective]:
        return [one for one in self.calls if backward is None or one.backward == backward]
