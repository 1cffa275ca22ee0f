"""``‖W + scaling · B·A‖`` of each row, DoRA's norm: contract and registration.

No gradient flows through it, so neither eager nor compiled code needs a backward of it. Transforms and
exported programs see PyTorch's own operations, and so do sharded tensors.
"""

from typing import Any

import torch
from torch import Tensor

from lorafast import operands
from lorafast.backends import forced, registry
from lorafast.backends import weight_norm as pytorch
from lorafast.backends.plan import Plan, Run
from lorafast.core import columns
from lorafast.core.context import alone, needs_plain_pytorch, watched
from lorafast.core.dtypes import LEAST_NORM
from lorafast.core.problem import WEIGHT_NORM
from lorafast.core.sms import carveout
from lorafast.operands import Weight
from lorafast.ops import flops
from lorafast.ops.calls import like_of
from lorafast.ops.checks import check_frozen, check_matrix
from lorafast.ops.problems import weight_norm_problem
from lorafast.ops.registration import pass_no_gradient, register
from lorafast.ops.unstrided import is_sharded

_KEPT = 4096
_runs: dict[tuple[object, ...], Run] = {}
registry.when_forgotten(_runs.clear)


def weight_norm(weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
    """``‖W + scaling · B·A‖`` of each row.

    Shapes: ``weight [N, K]``, a tensor or an operand of another format, ``lora_A [r, K]``,
    ``lora_B [N, r]`` → ``[N]`` in float32 (float64 of a float64 weight), at least ``LEAST_NORM``.
    ``scaling``: a number, or a tensor of one, whose value the host doesn't ask for. No gradient flows
    through it.

    Where ranks share K it is the norm of all their columns.

    A forced backend that has no such operation leaves it to the fastest one that has.

    Raises:
        BackendError: the forced backend has it, and can't serve the call.
    """
    norm = _of_columns(weight, lora_A, lora_B, scaling)
    part = columns.current()
    return norm if part is None else part.norm(norm, LEAST_NORM)


def _of_columns(weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
    """The norm of the columns that are there."""
    compiling = torch.compiler.is_compiling()
    if compiling or not alone():
        stored = operands.stored(weight)
        sharded = any(map(is_sharded, (*stored, lora_A, lora_B)))
        if sharded or needs_plain_pytorch(compiling) is not None:
            return pytorch.weight_norm(weight, lora_A, lora_B, scaling)
        if compiling or watched():
            if not compiling:
                flops.tell_counters()
            return _registered(weight, stored, lora_A, lora_B, scaling)
    return _found(weight, lora_A, lora_B, scaling)


def _registered(
    weight: Weight, stored: list[Tensor], lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor
) -> Tensor:
    if not isinstance(scaling, Tensor) and torch.compiler.is_compiling():
        # As an argument of an operation a number would be a constant of the graph.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        scaling = torch.full((), scaling, dtype=dtype, device=lora_A.device)
    number, factor = (1.0, scaling) if isinstance(scaling, Tensor) else (scaling, None)
    norm: Tensor = torch.ops.lorafast.weight_norm(
        lora_A, lora_B, stored, operands.describe(weight), number, factor
    )
    return norm


def _check(lora_A: Tensor, lora_B: Tensor, weight: list[Tensor], format: str) -> Weight:
    W = operands.build(weight, format)
    check_frozen(W)
    check_matrix("weight", W, "N", "K")
    N, K = W.shape
    check_matrix("lora_A", lora_A, "r", K)
    check_matrix("lora_B", lora_B, N, lora_A.shape[0])
    return W


def _run(
    lora_A: Tensor,
    lora_B: Tensor,
    weight: list[Tensor],
    format: str,
    scaling: float = 1.0,
    factor: Tensor | None = None,
) -> Tensor:
    W = _check(lora_A, lora_B, weight, format)
    return _found(W, lora_A, lora_B, scaling if factor is None else factor)


def _fake(
    lora_A: Tensor,
    lora_B: Tensor,
    weight: list[Tensor],
    format: str,
    scaling: float = 1.0,
    factor: Tensor | None = None,
) -> Tensor:
    W = _check(lora_A, lora_B, weight, format)
    dtype = torch.promote_types(W.dtype, torch.float32)
    return torch.empty((W.shape[0],), dtype=dtype, device=W.device)


register(
    WEIGHT_NORM,
    "(Tensor lora_A, Tensor lora_B, Tensor[] weight, str format, float scaling=1.0, "
    "Tensor? factor=None) -> Tensor",
    _run,
    _fake,
)
pass_no_gradient(WEIGHT_NORM)


def _found(weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
    """By the plan that is kept for such tensors."""
    backend = _backend()
    others = (lora_A, lora_B, scaling) if isinstance(scaling, Tensor) else (lora_A, lora_B)
    key = (
        backend, carveout(), like_of(weight, lora_A, lora_B, None), type(scaling),
        *[t.device for t in (*operands.stored(weight), *others)],
    )  # fmt: skip
    run = _runs.get(key)
    if run is None:
        run = _planned(key, backend, weight, lora_A, lora_B, scaling)
    norm: Tensor = run(weight, lora_A, lora_B, scaling)
    return norm


def plan_of(weight: Weight, lora_A: Tensor, lora_B: Tensor) -> Plan:
    """The plan by which eager code takes the norm.

    Raises:
        BackendError: the forced backend has the operation, and can't serve it.
    """
    return registry.choose(weight_norm_problem(weight, lora_A, lora_B, 1.0), _backend())


def _backend() -> str | None:
    name = forced.forced()
    if name in registry.names() and WEIGHT_NORM not in registry.get(name).operations:
        return None
    return name  # of one that is registered no more ``choose`` says so


def _planned(key: tuple[object, ...], backend: str | None, *arguments: Any) -> Run:
    before = registry.times_forgotten()
    run = registry.choose(weight_norm_problem(*arguments), backend).run
    if before == registry.times_forgotten():
        if len(_runs) >= _KEPT:
            _runs.clear()
        _runs[key] = run
    return run
