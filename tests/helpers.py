"""What several test files share: random problems, the check of the contract, what a backend needs."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from layouts import LAYOUTS, lay_out
from torch import Tensor

import lorafast
from lorafast.reference import contract

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DROPOUT = (0.0, 0.05, 0.5, 1.0)


@dataclass(frozen=True)
class Problem:
    """One layer's tensors, drawn in float64."""

    M: int
    K: int
    N: int
    r: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    dropout_p: float
    layout: str
    draw_seed: int

    def tensors(self, device: torch.device) -> SimpleNamespace:
        generator = torch.Generator().manual_seed(self.draw_seed)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64).to(device)

        M, K, N, r = self.M, self.K, self.N, self.r
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator).to(device)
        return SimpleNamespace(
            x=draw(M, K),
            dy=draw(M, N),
            s=draw(M, r),
            ds=draw(M, r),
            weight=draw(N, K),
            lora_A=draw(r, K),
            lora_B=draw(N, r),
            bias=draw(N),
            seed=seed if self.dropout_p else None,
        )

    def lay_out(self, tensor: Tensor) -> Tensor:
        return lay_out(tensor, self.layout)


_sizes = st.one_of(st.integers(1, 9), st.integers(10, 140))
_ranks = st.one_of(st.integers(1, 9), st.sampled_from((16, 17, 33, 64, 100, 129, 256)))


def problems() -> st.SearchStrategy[Problem]:
    return st.builds(
        Problem,
        M=st.one_of(st.just(0), _sizes),
        K=_sizes,
        N=_sizes,
        r=_ranks,
        dtype=st.sampled_from(DTYPES),
        adapter_dtype=st.sampled_from((torch.float32, torch.bfloat16)),
        dropout_p=st.sampled_from(DROPOUT),
        layout=st.sampled_from(LAYOUTS),
        draw_seed=st.integers(0, 2**32),
    )


def several(p: Problem, device: torch.device, most: int = 32) -> list[SimpleNamespace]:
    """The tensors of layers like ``p``, to be held to the contract together: of few elements the error
    is luck, and an output of a layer has roundings of others in it."""
    fewest = min(max(p.M, 1), p.r) * min(p.K, p.N)
    return [
        replace(p, draw_seed=p.draw_seed + i).tensors(device)
        for i in range(min(-(-256 // fewest), most))
    ]


def stacked(results: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Output by output."""
    return tuple(torch.stack(same) for same in zip(*results, strict=True))


def assert_contract(
    call: contract.Call,
    operations: object,
    dtype: torch.dtype,
    rounded_to: torch.dtype | None = None,
) -> None:
    verdict = contract.compare(call, operations, dtype, rounded_to)
    assert verdict.why_broken is None, verdict.why_broken


def covering(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Choices of a value of each axis in which every two values of two axes meet: where no path takes
    three to tell, they find what all choices do, and are few. The same ones each time."""
    pairs = itertools.combinations(range(len(axes)), 2)
    left = {
        (i, a, j, b): None
        for i, j in pairs
        for a, b in itertools.product(range(len(axes[i])), range(len(axes[j])))
    }

    def met(place: int, value: int, chosen: dict[int, int]) -> int:
        ends = (sorted([(place, value), other]) for other in chosen.items())
        return sum((*one, *two) in left for one, two in ends)

    found = []
    while left:
        i, a, j, b = next(iter(left))
        chosen = {i: a, j: b}
        for k in range(len(axes)):
            if k not in chosen:
                # Of equals the one that comes next in turn.
                turn = [(len(found) + n) % len(axes[k]) for n in range(len(axes[k]))]
                chosen[k] = max(turn, key=lambda value, k=k: met(k, value, chosen))
        for one, two in itertools.combinations(sorted(chosen.items()), 2):
            left.pop((*one, *two), None)
        found.append(tuple(axis[chosen[k]] for k, axis in enumerate(axes)))
    return sorted(found, key=lambda row: [axis.index(v) for axis, v in zip(axes, row, strict=True)])


def skip_unless_usable(backend: str) -> None:
    status = lorafast.backends()[backend]
    if not status.usable:
        pytest.skip(status.reason)
