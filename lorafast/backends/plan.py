"""What a backend answers to a problem: a plan or a refusal."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lorafast.core.problem import LAYER_OPERATIONS, OPERATIONS, Problem

Run = Callable[..., Any]


@dataclass(frozen=True)
class Plan:
    """How a backend serves a problem; ``run`` does it, on tensors alone.

    ``run`` takes, by position,

    - ``shrink``: ``x, lora_A, dropout_p, seed`` and returns ``s``;
    - ``expand``: ``s, lora_B, scaling, dropout_p, seed`` and returns ``y`` in the problem's dtype;
    - ``linear_expand``: ``x, weight, s, lora_B, scaling, bias, dropout_p, seed`` and returns ``y``;
      transposed, ``dy, weight, ds, lora_Aᵀ, …`` and returns ``dx``;
    - ``expand_backward``: ``dy, s, lora_B, scaling`` and returns ``ds, dB, dbias``, None for what isn't
      wanted;
    - ``shrink_backward``: ``ds, x, dropout_p, seed`` and returns ``dA`` in the adapters' dtype;
    - ``lora_linear``: ``x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed`` and returns
      ``y, s``;
    - ``lora_linear_backward``: ``dy, x, weight, lora_A, lora_B, s, scaling, dropout_p, seed`` and
      returns ``dx, dweight, dA, dB, dbias``, None for what isn't wanted. What no wanted result depends
      on may be None.

    ``weight`` is an operand (``lorafast.operands``) of the problem's format, ``x`` and ``dy`` are
    matrices of the problem's shapes.

    ``launches`` says what will be launched, one line each. ``seconds`` is what the call takes, the
    device's time or the host's, whichever is longer: measured or modelled, as ``source`` says; None if
    there is neither. ``ahead`` is the measurement by which the plan is the fastest of all, where that
    is a rule and no time. A ``differentiable`` plan, of ``lora_linear`` where ``s`` isn't wanted, is
    made of PyTorch's own operations, to be differentiated by PyTorch, and returns ``y`` alone.
    """

    backend: str
    run: Run
    launches: tuple[str, ...]
    seconds: float | None = None
    source: str = ""
    measured: bool = False
    ahead: str | None = None
    differentiable: bool = False


@dataclass(frozen=True)
class Refusal:
    """Why a backend can't serve a problem: a sentence."""

    backend: str
    reason: str


class Backend(ABC):
    """One way to compute the operations. ``register`` puts it among those that there are."""

    name: ClassVar[str]
    operations: ClassVar[frozenset[str]] = frozenset((*OPERATIONS, *LAYER_OPERATIONS))
    """Those that it plans, by default a LoRA linear layer's; it is not asked for another."""
    plain_pytorch: ClassVar[bool] = False
    """Whether it is the definition, which serves where only PyTorch's own operations will do."""

    def why_unusable(self) -> str | None:
        """What this machine lacks for it, a sentence, or None."""
        return None

    @abstractmethod
    def plan(self, problem: Problem) -> Plan | Refusal:
        """How it serves the problem, or why it can't. Asked once for a problem: plans are kept."""

    def allow_checks(self, device: torch.device) -> None:
        """Has ``lorafast verify`` run it on ``device`` where it serves for checks alone."""
        return

    def remark(self) -> str | None:
        """What whoever checks its results should know, a sentence, or None."""
        return None

    def describe(self) -> list[tuple[str, str]]:
        """Lines of ``lorafast info`` about it: what, and how it is here."""
        return []
