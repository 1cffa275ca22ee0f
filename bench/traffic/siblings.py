"""Counts layers that share x (q, k, v; gate, up): the frozen ones, adapted one by one, and siblings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lorafast.bench.common.contenders import FROZEN, SIBLINGS
from lorafast.bench.common.problem import DTYPES, SCALING, Problem
from lorafast.bench.common.shapes import MODELS
from lorafast.bench.traffic import counted
from lorafast.bench.traffic.counted import Counted
from lorafast.bench.traffic.launches import H200_SMS
from torch import Tensor

from lorafast import ops
from lorafast.operands import DENSE
from lorafast.ops.siblings import Shared, Sibling, together

GROUPS = (("q", "k", "v"), ("gate", "up"))


@dataclass
class Row(Counted):
    """The traffic of a group's forward and backward, sums of its gradients of x among it, in bytes."""

    group: str
    M: int
    r: int
    dtype: str
    adapter_dtype: str


def groups_of(
    problems: Sequence[Problem],
) -> list[tuple[str, tuple[tuple[int, int], ...], Problem]]:
    """The groups in the models that layers are named after: name, ``(K, N)`` of each, a problem."""
    found: dict[tuple[object, ...], tuple[str, tuple[tuple[int, int], ...], Problem]] = {}
    for problem in problems:
        model = MODELS.get(problem.shape.label.split(" ")[0])
        if model is None or problem.dropout_p or problem.base != DENSE:
            continue
        for group in GROUPS:
            sizes = tuple(model.linears[name] for name in group if name in model.linears)
            if len(sizes) > 1:
                name = f"{model.name} {','.join(group)}"
                key = (name, problem.shape.M, problem.r, problem.dtype, problem.adapter_dtype)
                found.setdefault(key, (name, sizes, problem))
    return list(found.values())


def measure(
    name: str, sizes: Sequence[tuple[int, int]], problem: Problem, *, sms: int = H200_SMS
) -> list[Row]:
    """Rows of the frozen group, of its layers one by one, and of siblings; as on so many ``sms``."""
    M, r = problem.shape.M, problem.r
    dtype, adapter_dtype = DTYPES[problem.dtype], DTYPES[problem.adapter_dtype]

    def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    K = sizes[0][0]
    x = empty(M, K).requires_grad_()
    layers = [
        Sibling(
            empty(N, K),
            empty(r, K, dtype=adapter_dtype).requires_grad_(),
            empty(N, r, dtype=adapter_dtype).requires_grad_(),
            SCALING,
            None,
        )
        for _, N in sizes
    ]
    dys = [empty(M, N) for _, N in sizes]

    def frozen() -> tuple[Callable[[], Any], Callable[[], Any]]:
        ys: list[Tensor] = []
        return (
            lambda: ys.extend(F.linear(x, one.weight) for one in layers),
            lambda: torch.autograd.grad(ys, x, dys),
        )

    def one_by_one() -> tuple[Callable[[], Any], Callable[[], Any]]:
        ys: list[Tensor] = []
        leaves = [x, *(t for one in layers for t in one[1:3])]
        return (
            lambda: ys.extend(
                ops.lora_linear(x, one.weight, one.lora_A, one.lora_B, SCALING) for one in layers
            ),
            lambda: torch.autograd.grad(ys, leaves, dys),
        )

    def siblings() -> tuple[Callable[[], Any], Callable[[], Any]]:
        shared = Shared(x, dict(enumerate(layers)))
        # What its nodes call: counting sees every operation, and siblings are for where nothing does.
        node = shared.take(0, x).grad_fn.next_functions[0][0]  # type: ignore[union-attr]

        @torch.no_grad()
        def forward() -> None:
            shared.shrink(x)
            for index in range(len(layers)):
                shared.y(index, x)

        return forward, torch.no_grad()(lambda: together(node, dys))

    rows = []
    for contender, make in ((FROZEN, frozen), ("lorafast", one_by_one), (SIBLINGS, siblings)):
        row = Row(name, M, r, problem.dtype, problem.adapter_dtype, contender=contender)
        row.count(sms, *make())
        rows.append(row)
    return rows


def format_rows(rows: Sequence[Row]) -> str:
    """A line for each contender."""
    first = rows[0]
    title = (
        f"{first.group}: M={first.M}, r={first.r}, {first.dtype}, {first.adapter_dtype} adapters, with "
        "the sums of their gradients of x"
    )
    return counted.format_rows(title, rows)
