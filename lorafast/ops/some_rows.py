"""The LoRA linear layer with its adapter on some rows of a batch: those of the policy, beside which the
others are those of the reference model.

    y = x·Wᵀ + bias                      one product for all rows
    s = drop(x[own])·Aᵀ                  shrink
    y[own] += scaling · s·Bᵀ             expand

    ds, dB = those of dy[own]            expand_backward
    dA = dsᵀ·drop(x[own])                shrink_backward
    dx = dy·W                            one product for all rows
    dx[own] += drop'(ds·A)               expand

Where the other rows are constants their dx is 0, and the backward is that of the own rows, with
``linear_expand`` for dx. The other rows meet no number of the adapter's: zeros in their rows of ``s``
would be NaN times an infinite B.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafast import operands
from lorafast.backends import forced, registry
from lorafast.backends.plan import Run
from lorafast.core import columns
from lorafast.core.context import (
    autocast_anywhere,
    is_batched,
    needs_plain_pytorch,
    watched,
    without_autocast,
)
from lorafast.core.problem import PLAIN, Problem
from lorafast.operands import Weight
from lorafast.ops import flops
from lorafast.ops.checks import check_lora_linear
from lorafast.ops.lora_linear import in_shape_of, unpacked
from lorafast.ops.problems import (
    as_rows,
    expand_backward_problem,
    expand_problem,
    linear_expand_problem,
    shrink_backward_problem,
    shrink_problem,
)
from lorafast.ops.quantized_linear import quantized_linear

_SEEDS = 2**63 - 1


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
    frozen = [*operands.stored(weight), *([] if bias is None else [bias])]
    tensors = (x, lora_A, lora_B, *frozen)
    able = (
        not torch.compiler.is_compiling()
        and needs_plain_pytorch() is None
        and not watched()
        and not autocast_anywhere()
        and all(type(t) in PLAIN for t in tensors)
        and not any(t.requires_grad for t in frozen)
    )
    if not able or not check_lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p):
        return None
    seed = torch.randint(_SEEDS, (1,), device=x.device) if dropout_p else None
    part = columns.current()
    if seed is not None and part is not None:
        seed = part.seed(seed)
    settings = _Settings(scaling, own, dropout_p, constants, forced.forced())
    y: Tensor = _OnSomeRows.apply(settings, x, weight, lora_A, lora_B, bias, seed)
    return y


class _Settings:
    """What of a call is no tensor."""

    __slots__ = ("backend", "constants", "dropout_p", "own", "scaling")

    def __init__(
        self,
        scaling: float,
        own: tuple[int, int],
        dropout_p: float,
        constants: bool,
        backend: str | None,
    ) -> None:
        self.scaling, self.own, self.dropout_p = scaling, own, dropout_p
        self.constants, self.backend = constants, backend

    def planned(self, problem: Problem) -> Run:
        """What runs it, on the backend of the forward."""
        return registry.choose(problem, self.backend).run

    def rows(self, x: Tensor) -> slice:
        """The own rows of ``x [E, …, C]`` as a matrix."""
        each = x.shape[:-1].numel() // max(x.shape[0], 1)
        return slice(self.own[0] * each, self.own[1] * each)


class _OnSomeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: _Settings,
        x: Tensor,
        weight: Weight,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
    ) -> Tensor:
        p, rows, own = settings.dropout_p, as_rows(x), settings.rows(x)
        shrink = settings.planned(shrink_problem(rows[own], lora_A, p, seed))
        s = shrink(rows[own], lora_A, p, seed)
        y = _linear(rows, weight, bias)
        _add_expanded(settings, y[own], s, lora_B, settings.scaling, 0.0, None)
        _, need_dx, _, need_dA, need_dB, _, _ = ctx.needs_input_grad
        ctx.settings, ctx.description = settings, operands.describe(weight)
        ctx.save_for_backward(
            rows[own] if need_dA else None,
            lora_A if need_dx else None,
            lora_B if need_dx or need_dA else None,
            s if need_dB else None,
            seed,
            *(operands.stored(weight) if need_dx else ()),
        )
        ctx.adapter_dtype = lora_A.dtype
        return in_shape_of(x, y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        if is_batched(dy):
            raise RuntimeError(
                "what a LoRA layer gave in a block of mixed has no batched gradients "
                "(is_grads_batched, vectorize): ask for them one by one"
            )
        if torch.compiler.is_compiling():  # compiled autograd, which traces this
            return _backward(ctx, dy, _registered)
        with _as_the_forward(ctx.settings), without_autocast(dy):
            return _backward(ctx, dy, _seen())


def _as_the_forward(settings: _Settings) -> contextlib.AbstractContextManager[Any]:
    """On the backend of the forward."""
    if forced.forced() == settings.backend:
        return contextlib.nullcontext()
    return forced.use_backend(settings.backend or registry.AUTO)


def _backward(ctx: Any, dy: Tensor, observed: Callable[[Problem], Run] | None) -> tuple[Any, ...]:
    """The gradients; ``observed`` gives the operations that whoever looks on must see."""
    settings: _Settings = ctx.settings
    run_of = observed or settings.planned
    _, need_dx, _, need_dA, need_dB, _, _ = ctx.needs_input_grad
    x, lora_A, lora_B, s, seed, *stored = unpacked(ctx)
    own, p = settings.rows(dy), settings.dropout_p
    every_dy = as_rows(dy)
    own_dy = every_dy[own]
    wants = tuple(n for n, wanted in (("ds", need_dx or need_dA), ("dB", need_dB)) if wanted)
    ds: Any = None
    dA = dB = dx = None
    if wants:
        problem = expand_backward_problem(own_dy, s, lora_B, wants, ctx.adapter_dtype)
        ds, dB, _ = run_of(problem)(own_dy, s, lora_B, settings.scaling)
    if need_dA:
        problem = shrink_backward_problem(ds, x, p, seed, ctx.adapter_dtype)
        dA = run_of(problem)(ds, x, p, seed)
    if need_dx:
        weight, A_t = operands.build(stored, ctx.description), lora_A.t()
        if settings.constants:
            problem = linear_expand_problem(own_dy, weight, ds, A_t, None, p, seed, True)
            dx = run_of(problem)(own_dy, weight, ds, A_t, 1.0, None, p, seed)
            dx = F.pad(dx, (0, 0, own.start, every_dy.shape[0] - own.stop))
        else:
            dx = _linear_transposed(every_dy, weight)
            _add_expanded(settings, dx[own], ds, A_t, 1.0, p, seed, observed)
        dx = dx.view(*dy.shape[:-1], dx.shape[1])
    return None, dx, None, dA, dB if need_dB else None, None, None


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


def _add_expanded(
    settings: _Settings,
    y: Tensor,
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    observed: Callable[[Problem], Run] | None = None,
) -> None:
    """``y += drop(scaling · s·Bᵀ)``."""
    free = observed is None and settings.backend is None
    if free and not dropout_p and s.dtype is y.dtype:
        y.addmm_(s, lora_B.to(y.dtype).t(), alpha=scaling)  # no operation of ours accumulates
        return
    problem = expand_problem(s, lora_B, dropout_p, seed, s.dtype)
    low = (observed or settings.planned)(problem)(s, lora_B, scaling, dropout_p, seed)
    y.copy_(low.add_(y))


def _seen() -> Callable[[Problem], Run] | None:
    """The registered operations if a mode sees them.

    Raises:
        RuntimeError: a transform that began after the forward asks.
    """
    reason = needs_plain_pytorch()
    if reason is not None:
        raise RuntimeError(
            f"what a LoRA layer gave in a block of mixed has no gradients under {reason}: ask for them "
            "outside, or run the forward inside too"
        )
    if not watched():
        return None
    flops.tell_counters()
    return _registered


def _registered(problem: Problem) -> Run:
    """The registered operation of a problem of the backward, called as a plan is."""
    operations = torch.ops.lorafast

    def expand_backward(dy: Tensor, s: Any, lora_B: Any, scaling: float) -> Any:
        wants = ",".join(problem.wants)
        return operations.expand_backward(dy, s, lora_B, scaling, wants, problem.adapter_dtype)

    def shrink_backward(ds: Tensor, x: Tensor, dropout_p: float, seed: Tensor | None) -> Any:
        return operations.shrink_backward(ds, x, dropout_p, seed, problem.adapter_dtype)

    def expand(s: Tensor, *arguments: Any) -> Any:
        return operations.expand(s, *arguments, problem.dtype)

    def linear_expand(dy: Tensor, weight: Weight, *arguments: Any) -> Any:
        stored, description = operands.stored(weight), operands.describe(weight)
        return operations.linear_expand(dy, stored, description, *arguments, True)

    runs = (expand_backward, shrink_backward, expand, linear_expand)
    return next(run for run in runs if run.__name__ == problem.operation)
