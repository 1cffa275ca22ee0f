"""The LoRA linear layer with its adapter on some rows of a batch: those of the policy, beside which the
others are those of the reference model.

    y = x·Wᵀ + bias                            one product for all rows
    y[own] += scaling · (drop(x[own])·Aᵀ)·Bᵀ

    dA, dB, dx[own]                            the backward of a layer that has the own rows alone
    dx[others] = dy[others]·W                  0 where the other rows are constants

Where kernels compute it, dx too is one product for all rows, the adapter's part in the own ones. The
other rows meet no number of the adapter's: zeros in their rows of s would be NaN times an infinite
B.
"""

import contextlib
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafast import operands
from lorafast.backends import forced, registry
from lorafast.backends.plan import Run
from lorafast.core import columns
from lorafast.core.context import (
    alone,
    autocast_anywhere,
    is_batched,
    needs_plain_pytorch,
    watched,
    without_autocast,
)
from lorafast.core.problem import PLAIN, WANTS
from lorafast.operands import Weight
from lorafast.ops.calls import Call, first_call, layouts_matter, like_of, where
from lorafast.ops.checks import check_lora_linear
from lorafast.ops.lora_linear import layer_backward, unpacked
from lorafast.ops.problems import (
    FROZEN,
    allows_tf32,
    as_rows,
    backward_problem,
    expand_backward_problem,
    expand_problem,
    gradient_as_rows,
    shrink_backward_problem,
    shrink_problem,
)
from lorafast.ops.quantized_linear import quantized_linear

_SEEDS = 2**63 - 1
_KEPT = 4096


def lora_linear_on_some_rows(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    own: tuple[int, int],
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    constants: bool = False,
) -> Tensor | None:
    """``lora_linear`` of ``x[own[0]:own[1]]`` and ``x·Wᵀ + bias`` of all else of the first dimension.
    A mask is drawn from PyTorch's generator of the device.

    With ``constants`` no gradient passes the other rows: their ``dx`` is 0.

    None where it must be made of both: under autocast, in compiled code, under transforms and modes, of
    tensors that aren't PyTorch's plain ones, where W or the bias is trained.
    """
    if torch.compiler.is_compiling() or autocast_anywhere():
        return None
    if not alone() and (needs_plain_pytorch() is not None or watched()):
        return None
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    backend = forced.forced()
    key: tuple[object, ...] = (
        own, x.shape, x.dtype, x.layout, x.is_cpu, type(x), like_of(weight, lora_A, lora_B, bias),
        dropout_p, type(scaling), backend,
    )  # fmt: skip
    if layouts_matter(x, backend):
        key = (*key, where((x, *operands.stored(weight), lora_A, lora_B)), allows_tf32(x))
    call = _calls.get(key)
    if call is None:
        call = _first_call(key, x, weight, lora_A, lora_B, scaling, own, bias, dropout_p, backend)
        if call is None:
            return None
    seed = torch.randint(_SEEDS, (1,), device=x.device) if dropout_p else None
    part = columns.current()
    if seed is not None and part is not None:
        seed = part.seed(seed)
    inputs = (x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p)
    if torch.is_grad_enabled():
        y: Tensor = _apply(constants, call, *inputs)
        return y
    return _forward(call, *inputs)[0]


class _Call:
    """What a call is like: checked, with the plan for it."""

    __slots__ = ("alone", "end", "first", "run", "shrink")

    def __init__(
        self, first: int, end: int, alone: Call, run: Run | None, shrink: Run | None
    ) -> None:
        self.first, self.end = first, end
        """The own rows of x as a matrix."""
        self.alone = alone
        """The call of these rows by themselves."""
        self.run = run
        """What does it in one call, ``Plan.on_rows``."""
        self.shrink = shrink
        """Where there is none, what makes their s."""

    def own(self, t: Tensor) -> Tensor:
        """The own rows of ``t [..., C]``, a matrix; a view if ``t`` is contiguous."""
        if not t.is_contiguous():
            return as_rows(t)[self.first : self.end]
        first, C = self.first, t.shape[-1]
        # In one call of PyTorch's: behind a large product each costs several times what it does alone.
        return t.as_strided((self.end - first, C), (C, 1), t.storage_offset() + first * C)


_calls: dict[tuple[object, ...], _Call] = {}
registry.when_forgotten(_calls.clear)


def _first_call(
    key: tuple[object, ...],
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    own: tuple[int, int],
    bias: Tensor | None,
    dropout_p: float,
    backend: str | None,
) -> _Call | None:
    """Checks a call and plans it; None if kernels can't read its tensors."""
    tensors = (x, lora_A, lora_B, *operands.stored(weight), *([] if bias is None else [bias]))
    if not all(type(t) in PLAIN for t in tensors):
        return None
    if not check_lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p):
        return None
    each = x.shape[:-1].numel() // max(x.shape[0], 1)
    first, end = own[0] * each, own[1] * each
    own_x = as_rows(x)[first:end]
    before = registry.times_forgotten()
    one = first_call(None, own_x, weight, lora_A, lora_B, scaling, bias, dropout_p, backend)
    if one is None:
        return None
    run = registry.choose(one.problem._replace(wants=WANTS["lora_linear"]), backend).on_rows
    shrink = None
    if run is None:
        shrink = registry.choose(shrink_problem(own_x, lora_A, dropout_p, None), backend).run
    call = _Call(first, end, one, run, shrink)
    if before == registry.times_forgotten():
        if len(_calls) >= _KEPT:
            _calls.clear()
        _calls[key] = call
    return call


def _forward(
    call: _Call,
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """``y`` of all rows and ``s`` of the own ones."""
    if call.run is not None:
        rest = (scaling, bias, dropout_p, seed, call.first, call.end)
        y, s = call.run(as_rows(x), weight, lora_A, lora_B, *rest)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1]), s
    assert call.shrink is not None
    s = call.shrink(call.own(x), lora_A, dropout_p, seed)
    y = _linear(x, weight, bias).contiguous()
    _add_expanded(call.alone.backend, call.own(y), s, lora_B, scaling, 0.0, None)
    return y, s


def _add_expanded(
    backend: str | None,
    y: Tensor,
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """``y += drop(scaling · s·Bᵀ)``."""
    if backend is None and not dropout_p and s.dtype is y.dtype:
        y.addmm_(s, lora_B.to(y.dtype).t(), alpha=scaling)  # no operation of ours accumulates
        return
    problem = expand_problem(s, lora_B, dropout_p, seed, s.dtype)
    low = registry.choose(problem, backend).run(s, lora_B, scaling, dropout_p, seed)
    y.copy_(low.add_(y))


class _OnSomeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, constants: bool, call: _Call, *inputs: Any) -> Tensor:
        y, s = _forward(call, *inputs)
        x, weight, lora_A, lora_B, _, seed, ctx.scaling, ctx.dropout_p = inputs
        _, _, need_dx, _, need_dA, need_dB, *_ = ctx.needs_input_grad
        ctx.constants, ctx.call, ctx.lora_A = constants, call, lora_A
        ctx.description = operands.describe(weight)
        ctx.save_for_backward(
            x if need_dA else None,
            lora_A if need_dx else None,
            lora_B if need_dx or need_dA else None,
            s if need_dB else None,
            seed,
            *(operands.stored(weight) if need_dx else ()),
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        _, _, need_dx, _, need_dA, need_dB, *_ = ctx.needs_input_grad
        by_kernels = (
            need_dx
            and not ctx.constants
            and not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and not is_batched(dy)
            and alone()
        )
        backward = _together if by_kernels else _apart
        dx, dA, dB = backward(ctx, gradient_as_rows(dy), need_dx, need_dA, need_dB)
        if dx is not None and dy.dim() != 2:
            dx = dx.view(*dy.shape[:-1], dx.shape[1])
        return None, None, dx, None, dA, dB, *[None] * 4


_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""``dx``, ``dA``, ``dB``."""


def _apart(ctx: Any, dy: Tensor, need_dx: bool, need_dA: bool, need_dB: bool) -> _Gradients:
    """The own rows as a layer by itself has it: fast, differentiable, seen by modes, in batches."""
    x, lora_A, lora_B, s, seed, *stored = unpacked(ctx)
    call: _Call = ctx.call
    its = SimpleNamespace(
        saved_tensors=(
            None if x is None else call.own(x), lora_A, lora_B, s, seed, *stored,
        ),
        description=ctx.description,
        lora_A=ctx.lora_A,
        scaling=ctx.scaling,
        dropout_p=ctx.dropout_p,
        call=call.alone,
    )  # fmt: skip
    needs = (need_dx, False, need_dA, need_dB, False, False, False, False)
    dx, _, dA, dB, *_ = layer_backward(its, dy[call.first : call.end], needs)
    if dx is not None:
        with without_autocast(dy):
            dx = _among_others(ctx, dx, dy, stored)
    return dx, dA, dB


def _among_others(ctx: Any, dx: Tensor, dy: Tensor, stored: list[Tensor]) -> Tensor:
    """That of all rows, from ``dx`` of the own ones."""
    first, end = ctx.call.first, ctx.call.end
    if ctx.constants:
        return F.pad(dx, (0, 0, first, dy.shape[0] - end))
    W = operands.build(stored, ctx.description)
    with _as_the_forward(ctx.call.alone.backend):
        before, after = (_linear_transposed(rows, W) for rows in (dy[:first], dy[end:]))
    return torch.cat([before, dx, after])


def _together(ctx: Any, dy: Tensor, need_dx: bool, need_dA: bool, need_dB: bool) -> _Gradients:
    """One product with W for all rows, and the adapter's part onto it, by kernels."""
    x, lora_A, lora_B, s, seed, *stored = unpacked(ctx)
    call, scaling, p = ctx.call, ctx.scaling, ctx.dropout_p
    own, backend = slice(call.first, call.end), call.alone.backend
    with without_autocast(dy), _as_the_forward(backend):
        W, own_dy = operands.build(stored, ctx.description), dy[own]
        own_x = None if x is None else call.own(x)
        if need_dA and need_dB and dy.is_cpu:
            problem = backward_problem(call.alone.problem, FROZEN, own_dy, False)
            run = registry.choose(problem, backend).on_rows
            if run is not None:
                gradients: tuple[Tensor, Tensor, Tensor] = run(
                    dy, own_x, W, lora_A, lora_B, s, scaling, p, seed, call.first
                )
                return gradients
        dx = _linear_transposed(dy, W)
        wants, dtype = ("ds", "dB") if need_dB else ("ds",), ctx.lora_A.dtype
        problem = expand_backward_problem(own_dy, s, lora_B, wants, dtype)
        ds, dB, _ = registry.choose(problem, backend).run(own_dy, s, lora_B, scaling)
        dA = None
        if own_x is not None:
            problem = shrink_backward_problem(ds, own_x, p, seed, dtype)
            dA = registry.choose(problem, backend).run(ds, own_x, p, seed)
        _add_expanded(backend, dx[own], ds, lora_A.t(), 1.0, p, seed)
    return dx, dA, dB


def _as_the_forward(backend: str | None) -> contextlib.AbstractContextManager[Any]:
    """On the backend of the forward."""
    if forced.forced() == backend:
        return contextlib.nullcontext()
    return forced.use_backend(backend or registry.AUTO)


def _linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``x·Wᵀ + bias``, as the frozen layer computes it."""
    if isinstance(weight, Tensor):
        return operands.linear(x, weight, bias)
    return quantized_linear(x, weight, bias)


def _linear_transposed(dy: Tensor, weight: Weight) -> Tensor:
    """``dy·W``."""
    if isinstance(weight, Tensor):
        return operands.linear_transposed(dy, weight)
    return quantized_linear(dy, weight.unrounded(), transposed=True)


# Function.apply without its Python prologue, which unwraps what torch.func left behind: that never
# comes here.
_apply = super(torch.autograd.Function, _OnSomeRows).apply
