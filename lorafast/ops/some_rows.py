"""The LoRA linear layer with its adapter on some rows of a batch: those of the policy, beside which the
others are those of the reference model.

    s = drop(x[own])·Aᵀ, and 0 in all other rows    shrink
    y = x·Wᵀ + scaling · s·Bᵀ + bias                linear_expand, one for all rows

    ds, dB = those of dy[own]                       expand_backward
    dA = dsᵀ·drop(x[own])                           shrink_backward
    dx[own] = dy[own]·W + drop'(ds·A)               linear_expand, transposed

The other rows' dx is dy·W, or where they are constants 0: then the backward is that of the own rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafast import operands
from lorafast.backends import forced, registry
from lorafast.core import columns
from lorafast.core.context import (
    autocast_anywhere,
    autocast_enabled,
    is_batched,
    needs_plain_pytorch,
    watched,
    without_autocast,
)
from lorafast.core.problem import PLAIN
from lorafast.operands import Weight
from lorafast.ops.checks import check_lora_linear
from lorafast.ops.lora_linear import in_shape_of, unpacked
from lorafast.ops.problems import (
    as_rows,
    expand_backward_problem,
    linear_expand_problem,
    shrink_backward_problem,
    shrink_problem,
)

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

    def run(self, problem: Any, *arguments: Any) -> Any:
        """By the backend of the forward."""
        return registry.choose(problem, self.backend).run(*arguments)

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
        s = settings.run(shrink_problem(rows[own], lora_A, p, seed), rows[own], lora_A, p, seed)
        every_s = F.pad(s, (0, 0, own.start, rows.shape[0] - own.stop))
        problem = linear_expand_problem(rows, weight, every_s, lora_B, bias, 0.0, None, False)
        y = settings.run(problem, rows, weight, every_s, lora_B, settings.scaling, bias, 0.0, None)
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
        if autocast_enabled(dy):
            with without_autocast(dy):
                return _backward(ctx, dy)
        return _backward(ctx, dy)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    settings: _Settings = ctx.settings
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
        ds, dB, _ = settings.run(problem, own_dy, s, lora_B, settings.scaling)
    if need_dA:
        problem = shrink_backward_problem(ds, x, p, seed, ctx.adapter_dtype)
        dA = settings.run(problem, ds, x, p, seed)
    if need_dx:
        weight = operands.build(stored, ctx.description)
        A_t = lora_A.t()

        def dx_of(rows: Tensor, ds: Tensor, p: float) -> Tensor:
            problem = linear_expand_problem(rows, weight, ds, A_t, None, p, seed, True)
            found: Tensor = settings.run(problem, rows, weight, ds, A_t, 1.0, None, p, seed)
            return found

        M = every_dy.shape[0]
        if settings.constants:
            dx = F.pad(dx_of(own_dy, ds, p), (0, 0, own.start, M - own.stop))
        elif p == 0.0:
            dx = dx_of(every_dy, F.pad(ds, (0, 0, own.start, M - own.stop)), p)
        else:  # the mask is one of the own rows
            before, after = every_dy[: own.start], every_dy[own.stop :]
            dx = torch.cat(
                [
                    operands.linear_transposed(before, weight),
                    dx_of(own_dy, ds, p),
                    operands.linear_transposed(after, weight),
                ]
            )
        dx = dx.view(*dy.shape[:-1], dx.shape[1])
    return None, dx, None, dA, dB, None, None
