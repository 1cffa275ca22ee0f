"""A backend, and its two answers to a problem: a plan or a refusal."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lorafast.core.problem import LAYER_OPERATIONS, OPERATIONS, Problem

Run = Callable[..., Any]


@dataclass(frozen=True)
class Plan:
    """How a backend serves a problem. ``run`` does it, on tensors alone.

    ``run`` takes, by position,

    - ``shrink``: ``x, lora_A, dropout_p, seed`` and returns ``s``;
    - ``expand``: ``s, lora_B, scaling, dropout_p, seed`` and returns ``y`` in the problem's dtype;
    - ``linear_expand``: ``x, weight, s, lora_B, scaling, bias, dropout_p, seed`` and returns ``y``;
      transposed, ``dy, weight, ds, lora_Aᵀ, …`` and returns ``dx``;
    - ``expand_backward``: ``dy, s, lora_B, scaling`` and returns ``ds, dB, dbias``, None for what isn't
      wanted;
    - ``shrink_backward``: ``ds, x, dropout_p, seed`` and returns ``dA`` in the adapters' dtype;
    - ``lora_linear``: ``x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed`` and returns
      ``y, s``; ``s`` may be None if it isn't wanted and the problem is without ``graph``;
    - ``lora_linear_backward``: ``dy, x, weight, lora_A, lora_B, s, scaling, dropout_p, seed`` and
      returns ``dx, dweight, dA, dB, dbias``, None for what isn't wanted. What no wanted result depends
      on may be None;
    - ``grouped_lora_linear``: ``x, weight, lora_A, lora_B, scaling, assignment, bias`` and returns ``y``
      and ``s``, in the order of x with zeros where there is no adapter, None if it isn't wanted;
    - ``grouped_lora_linear_backward``: ``dy, x, weight, lora_A, lora_B, s, scaling, assignment`` and
      returns ``dx, dweight, dA, dB, dscaling, dbias``, under the same conditions;
    - ``weight_norm``: ``weight, lora_A, lora_B, scaling``, the last a number or a tensor of one, and
      returns the norms ``[N]`` in float32 (float64 of a float64 weight), through which no gradient
      flows;
    - ``bottleneck``: ``h, down, up, down_bias, up_bias, scaling, residual`` and returns ``y`` and
      ``a``, None if it isn't wanted. ``residual`` is None where that is h; both biases are None or none
      is;
    - ``bottleneck_backward``: ``dy, h, a, down, up, scaling`` and returns ``dh, dD, dd, dU, du``, None
      for what isn't wanted. What no wanted result depends on may be None;
    - ``scaled_linear``: ``x, weight, scale, bias`` and returns ``y`` and ``z``, None if it isn't wanted;
      ``z = x·Wᵀ + bias``, asked for where y is scaled;
    - ``scaled_linear_backward``: ``dy, kept, weight, scale`` and returns ``dx, dscale``, None for what
      isn't wanted. ``kept`` is z, or x where that is scaled. What no wanted result depends on may be
      None.

    ``weight`` is an operand (``lorafast.operands``) of the problem's format, ``x`` and ``dy`` are
    matrices of the problem's shapes. Of several adapters, ``lora_A [n, r, K]``, ``lora_B [n, N, r]`` and
    ``scaling [n]`` are tensors, and the ``assignment`` (``lorafast.core.assignment``) has indices that
    were checked.

    - ``launches``: what will be launched, a line each;
    - ``seconds``: the time of a call, the device's or the host's, whichever is longer; None if unknown;
    - ``source``, ``measured``: where ``seconds`` comes from, and whether it was measured, not modelled;
    - ``ahead``: the measured rule by which this plan is the fastest of all, or None;
    - ``of_stored``: of ``lora_linear`` over an operand, what makes of it ``run`` over the tensors in
      which such an operand is stored: ``x, stored, lora_A, lora_B, scaling, bias`` gives ``y, s``. None
      if the backend has no shorter way to them, as may be what it gives;
    - ``on_rows``: of ``lora_linear``, the same with the adapter on the rows from ``first`` to ``end``
      alone, two arguments more: ``y`` of all rows and ``s`` of these. Of ``lora_linear_backward`` with
      ``dx, dA, dB`` wanted, for x and s of these rows alone, and ``first``: ``dx`` of all rows, ``dA``
      and ``dB``. The other rows meet no number of the adapter's. None if the backend has no such call;
    - ``differentiable``: the plan is made of PyTorch's own operations, which PyTorch differentiates, and
      returns ``y`` alone. Only ``lora_linear`` without dropout, where ``s`` isn't wanted, may have it.
    """

    backend: str
    run: Run
    launches: tuple[str, ...]
    seconds: float | None = None
    source: str = ""
    measured: bool = False
    ahead: str | None = None
    differentiable: bool = False
    of_stored: Callable[[Any], Run | None] | None = None
    on_rows: Run | None = None


@dataclass(frozen=True)
class Refusal:
    """Why a backend can't serve a problem: one sentence that names the value, and what is served."""

    backend: str
    reason: str


class Backend(ABC):
    """One way to compute the operations. ``register`` adds an object of it to the registry."""

    name: ClassVar[str]
    operations: ClassVar[frozenset[str]] = frozenset((*OPERATIONS, *LAYER_OPERATIONS))
    """Those that it plans, by default a LoRA linear layer's; it is not asked for another."""
    plain_pytorch: ClassVar[bool] = False
    """Whether it is made of operations that PyTorch differentiates itself, as the definition is."""

    def why_unusable(self) -> str | None:
        """Why this machine can't use it, a sentence, or None. Asked before every new problem."""
        return None

    @abstractmethod
    def plan(self, problem: Problem) -> Plan | Refusal:
        """How it serves the problem, or why it can't. Asked once for a problem: the answer is kept."""

    def alternatives(self, problem: Problem) -> dict[str, "Backend"]:
        """What else could serve the problem beside its plan, to be timed: each by a backend like this
        one that takes it, under what tells it from the others."""
        return {}

    def allow_checks(self, device: torch.device) -> None:
        """Makes it usable on ``device`` for ``lorafast verify``, where it is usable for checks alone."""
        return

    def remark(self) -> str | None:
        """A sentence for the reader of ``lorafast verify``, or None."""
        return None

    def describe(self) -> list[tuple[str, str]]:
        """Lines of ``lorafast info`` about it: pairs of a name and a value."""
        return []
