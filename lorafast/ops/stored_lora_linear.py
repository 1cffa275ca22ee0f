"""The LoRA linear layer over the tensors that an operand is stored in, where a call is like one before.

A layer holds tensors, not an operand. Building and checking that, and looking for a plan, cost more than
the adapter's arithmetic with few rows of x, the more as a large weight has left Python's memory cold. So
a layer remembers what stands for its tensors (``Memory``), and what ran over tensors like these
(``Again``): the operand is neither built nor read again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lorafast import operands
from lorafast.backends import forced, registry
from lorafast.backends.plan import Run
from lorafast.core.context import dispatch_modes, function_modes, traced, transforms_active
from lorafast.operands import Operand
from lorafast.ops.calls import Call, Like, Memory
from lorafast.ops.lora_linear import in_shape_of, layer_backward
from lorafast.ops.problems import as_rows, layer_problem


class Again:
    """What runs calls over the same shapes and dtypes of everything; checked and planned once."""

    __slots__ = ("call", "description", "run")

    def __init__(self, call: Call, description: str, run: Run) -> None:
        self.call, self.description, self.run = call, description, run


_KEPT = 4096
_likes: dict[tuple[object, ...], Like] = {}
_again: dict[tuple[object, ...], Again | None] = {}
registry.when_forgotten(_again.clear)


def lora_linear_again(
    x: Tensor,
    stored: list[Tensor],
    description: str,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    memory: Memory,
) -> Tensor | None:
    """``lora_linear`` without dropout and outside autocast over the operand that is stored so; None
    where ``remember`` has not seen such a call, or something surrounds it. ``x`` is a ``Tensor`` itself.
    """
    if torch.compiler.is_compiling():  # which must see no id: it would be guarded, layer by layer
        return None
    ids = (description, id(lora_A), id(lora_B), id(bias), *map(id, stored))
    if (
        ids != memory.kept[0]
        or transforms_active()
        or forward_ad._current_level >= 0
        or traced()
        or dispatch_modes()
        or function_modes()
        or forced.forced() is not None
    ):
        return None
    # The adapter's dtypes and that of the codes, which nothing else checks: they may change in place.
    key = (
        memory.kept[1], x.shape, x.dtype, x.layout, x.is_cpu, type(scaling), lora_A.dtype,
        lora_B.dtype, stored[0].dtype,
    )  # fmt: skip
    again = _again.get(key)
    if again is None or any(t.requires_grad for t in stored):
        return None
    try:
        if torch.is_grad_enabled():
            y: Tensor = _apply(again, x, stored, lora_A, lora_B, scaling, bias)
            return y
        return _forward(again, x, stored, lora_A, lora_B, scaling, bias)[0]
    except RuntimeError:  # a tensor may have been given another shape or dtype in place
        memory.kept = ((), None)
        return None


def remember(
    memory: Memory,
    x: Tensor,
    weight: object,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    description: str,
) -> None:
    """Lets ``lora_linear_again`` serve calls like this one, which ``lora_linear`` has served: without
    dropout, over ``weight``, which a layer holds as ``description`` says.
    """
    if not isinstance(weight, Operand) or not x.is_cpu or forced.forced() is not None:
        return
    stored = operands.stored(weight)
    ids = (description, id(lora_A), id(lora_B), id(bias), *map(id, stored))
    if ids != memory.kept[0]:
        tensors = [t for t in (lora_A, lora_B, bias, *stored) if t is not None]
        if len(_likes) >= _KEPT:
            _likes.clear()
        like = (
            description,
            bias is None,
            *[(t.shape, t.dtype, t.device, type(t)) for t in tensors],
        )
        memory.kept = (ids, _likes.setdefault(like, Like()))
    key = (
        memory.kept[1], x.shape, x.dtype, x.layout, True, type(scaling), lora_A.dtype, lora_B.dtype,
        stored[0].dtype,
    )  # fmt: skip
    if key in _again:
        return
    before = registry.times_forgotten()
    problem = layer_problem(as_rows(x), weight, lora_A, lora_B, bias, False, ("y",), layouts=False)
    call = Call(problem, None, x.dim() == 2, weight.layout)
    run = None if call.of_stored is None else call.of_stored(weight)
    if len(_again) >= _KEPT:
        _again.clear()
    if before == registry.times_forgotten():
        _again[key] = None if run is None else Again(call, operands.describe(weight), run)


def _forward(
    again: Again,
    x: Tensor,
    stored: list[Tensor],
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``y`` in the shape of ``x`` and ``s [M, r]``."""
    if again.call.matrix:
        y, s = again.run(x, stored, lora_A, lora_B, scaling, bias)
        return y, s
    y, s = again.run(as_rows(x), stored, lora_A, lora_B, scaling, bias)
    return in_shape_of(x, y), s


class _StoredLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        again: Again,
        x: Tensor,
        stored: list[Tensor],
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        bias: Tensor | None,
    ) -> Tensor:
        y, s = _forward(again, x, stored, lora_A, lora_B, scaling, bias)
        _, need_dx, _, need_dA, need_dB, _, _ = ctx.needs_input_grad
        # As ops.lora_linear keeps it, whose backward this is.
        ctx.save_for_backward(
            x if need_dA else None,
            lora_A if need_dx else None,
            lora_B if need_dx or need_dA else None,
            s if need_dB else None,
            None,
            *(stored if need_dx else ()),
        )
        ctx.call, ctx.description = again.call, again.description
        ctx.lora_A, ctx.scaling, ctx.dropout_p = lora_A, scaling, 0.0
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        _, need_dx, _, need_dA, need_dB, _, need_dbias = ctx.needs_input_grad
        needs = (need_dx, False, need_dA, need_dB, False, need_dbias, False, False)
        dx, _, dA, dB, _, dbias, _, _ = layer_backward(ctx, dy, needs)
        return None, dx, None, dA, dB, None, dbias


# As in ops.lora_linear: without the Python prologue of Function.apply.
_apply = super(torch.autograd.Function, _StoredLoRALinear).apply
