"""``‖W + scaling · B·A‖`` of each row, DoRA's norm: found, planned and run.

No gradient flows through it, so eager code needs no ``autograd.Function`` around a plan. Compiled code,
transforms and modes see PyTorch's own operations.
"""

from typing import Any

import torch
from torch import Tensor

from lorafast import operands
from lorafast.backends import forced, registry
from lorafast.backends import weight_norm as pytorch
from lorafast.backends.plan import Plan, Run
from lorafast.core.context import alone, needs_plain_pytorch, watched
from lorafast.core.problem import WEIGHT_NORM
from lorafast.core.sms import carveout
from lorafast.operands import Weight
from lorafast.ops.calls import like_of
from lorafast.ops.problems import weight_norm_problem

_KEPT = 4096
_runs: dict[tuple[object, ...], Run] = {}
registry.when_forgotten(_runs.clear)


def weight_norm(weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
    """``‖W + scaling · B·A‖`` of each row.

    Shapes: ``weight [N, K]``, a tensor or an operand of another format, ``lora_A [r, K]``,
    ``lora_B [N, r]`` → ``[N]`` in float32 (float64 of a float64 weight), at least ``LEAST_NORM``.
    ``scaling``: a number, or a tensor of one, whose value the host doesn't ask for. No gradient flows
    through it.

    A forced backend that has no such operation leaves it to the fastest one that has.

    Raises:
        BackendError: the forced backend has it, and can't serve the call.
    """
    norm: Tensor
    compiling = torch.compiler.is_compiling()
    if compiling or (not alone() and (needs_plain_pytorch() is not None or watched())):
        return pytorch.weight_norm(weight, lora_A, lora_B, scaling)
    backend = _backend()
    others = (lora_A, lora_B, scaling) if isinstance(scaling, Tensor) else (lora_A, lora_B)
    key = (
        backend, carveout(), like_of(weight, lora_A, lora_B, None), type(scaling),
        *[t.device for t in (*operands.stored(weight), *others)],
    )  # fmt: skip
    run = _runs.get(key)
    if run is None:
        run = _planned(key, backend, weight, lora_A, lora_B, scaling)
    norm = run(weight, lora_A, lora_B, scaling)
    return norm


def plan_of(weight: Weight, lora_A: Tensor, lora_B: Tensor) -> Plan:
    """The plan by which eager code takes the norm.

    Raises:
        BackendError: the forced backend has the operation, and can't serve it.
    """
    return registry.choose(weight_norm_problem(weight, lora_A, lora_B, 1.0), _backend())


def _backend() -> str | None:
    name = forced.forced()
    return name if name is None or WEIGHT_NORM in registry.get(name).operations else None


def _planned(key: tuple[object, ...], backend: str | None, *arguments: Any) -> Run:
    before = registry.times_forgotten()
    run = registry.choose(weight_norm_problem(*arguments), backend).run
    if before == registry.times_forgotten():
        if len(_runs) >= _KEPT:
            _runs.clear()
        _runs[key] = run
    return run
