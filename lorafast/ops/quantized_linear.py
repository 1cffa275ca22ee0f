"""``y = x·Wᵀ + bias`` over a frozen weight that isn't stored dense: contract, gradient, registration.

It is ``linear_expand`` without an adapter: a backend is planned for rank 0. W gets no gradient, so x is
not kept. ``dx = dy·W`` is the same operation transposed, and so on for every derivative after.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafast import operands
from lorafast.backends import forced, registry
from lorafast.core.context import (
    alone,
    is_batched,
    needs_plain_pytorch,
    watched,
    without_autocast,
)
from lorafast.core.dtypes import wide
from lorafast.operands import Operand
from lorafast.ops import flops
from lorafast.ops.checks import (
    check_device,
    check_float,
    check_frozen,
    check_matrix,
    check_no_dtensors,
    check_same_dtype,
    check_shape,
    describe_layout,
    has_rows,
)
from lorafast.ops.problems import as_rows, gradient_as_rows, linear_expand_problem, planned
from lorafast.ops.registration import register, register_autograd


def _check(x: Tensor, W: Any, bias: Tensor | None, transposed: bool) -> None:
    check_float("x", x)
    if not isinstance(W, Operand):
        raise TypeError(
            f"weight is a {type(W).__name__}, expected an operand (F.linear takes a tensor)"
        )
    check_float("weight", W, Operand)
    check_matrix("weight", W, "out_features", "in_features")
    if not has_rows(x):
        raise ValueError(f"x is {describe_layout(x)}, expected a strided tensor")
    out, width = (W.shape[1], W.shape[0]) if transposed else (W.shape[0], W.shape[1])
    if x.dim() == 0 or x.shape[-1] != width:
        raise ValueError(
            f"x has shape {list(x.shape)}, expected [..., {width}]: weight is {list(W.shape)}"
        )
    check_same_dtype("weight", W, "x", x.dtype)
    check_device("weight", W, x.device, "x")
    check_frozen(W)
    if bias is not None:
        check_float("bias", bias)
        check_shape("bias", bias, out)
        check_same_dtype("bias", bias, "x", x.dtype)
        check_device("bias", bias, x.device, "x")


def _multiplied(x: Tensor, W: Operand, bias: Tensor | None, transposed: bool) -> Tensor:
    """By the forced backend, or the fastest."""
    rows = as_rows(x)
    N = W.shape[1] if transposed else W.shape[0]
    s, lora_B = rows.new_empty((rows.shape[0], 0), dtype=wide(x.dtype)), rows.new_empty((N, 0))
    problem = linear_expand_problem(rows, W, s, lora_B, bias, 0.0, None, transposed)
    y: Tensor = planned(problem)(rows, W, s, lora_B, 1.0, bias, 0.0, None)
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], N))


def _plain(x: Tensor, W: Operand, bias: Tensor | None, transposed: bool) -> Tensor:
    """By PyTorch's own calls."""
    dense = W.dense()
    if transposed:
        return F.linear(x, dense.t(), bias)
    return F.linear(operands.activations(x, W), dense, bias)


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Operand, bias: Tensor | None, transposed: bool, *stored: Tensor
    ) -> Tensor:
        ctx.description, ctx.transposed = operands.describe(W), transposed
        ctx.backend = forced.forced()
        ctx.save_for_backward(*(stored if ctx.needs_input_grad[0] else ()))
        with without_autocast(x):
            return _multiplied(x, W, bias, transposed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        dx = dbias = None
        with without_autocast(dy):
            if ctx.needs_input_grad[0]:
                stored = ctx.saved_tensors
                W: Any = operands.build(stored, ctx.description)
                W = W.unrounded()
                with forced.use_backend(ctx.backend or registry.AUTO):
                    dx = _run(dy, W, None, not ctx.transposed)
            if ctx.needs_input_grad[2]:
                dbias = gradient_as_rows(dy).sum(0)
        return dx, None, dbias, None, *[None] * (len(ctx.needs_input_grad) - 4)


def _run(x: Tensor, W: Operand, bias: Tensor | None, transposed: bool) -> Tensor:
    """On checked arguments, as what surrounds the call asks."""
    stored = operands.stored(W)
    compiling = torch.compiler.is_compiling()
    if not compiling and is_batched(x):  # is_grads_batched, which no kernel knows
        return _plain(x, W, bias, transposed)
    if compiling or not alone():
        reason = needs_plain_pytorch(compiling)
        if reason is not None:
            forced.check_plain_pytorch("quantized_linear", reason)
            return _plain(x, W, bias, transposed)
        if compiling or watched():
            if not compiling:
                flops.tell_counters()
            y: Tensor = torch.ops.lorafast.quantized_linear(
                x, stored, operands.describe(W), bias, transposed
            )
            return y
    needs = x.requires_grad or (bias is not None and bias.requires_grad)
    if needs and torch.is_grad_enabled():
        return cast(Tensor, _QuantizedLinear.apply(x, W, bias, transposed, *stored))
    return _multiplied(x, W, bias, transposed)


def _registered_run(
    x: Tensor,
    weight: list[Tensor],
    format: str,
    bias: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    W: Any = operands.build(weight, format)
    _check(x, W, bias, transposed)
    return _multiplied(x, W, bias, transposed)


def _registered_fake(
    x: Tensor,
    weight: list[Tensor],
    format: str,
    bias: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    W: Any = operands.build(weight, format)
    _check(x, W, bias, transposed)
    return x.new_empty((*x.shape[:-1], W.shape[1] if transposed else W.shape[0]))


def _registered_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, stored, ctx.description, *rest = inputs
    ctx.transposed = rest[1] if len(rest) > 1 else False
    ctx.has_bias, ctx.stored = bool(rest) and rest[0] is not None, len(stored)
    ctx.save_for_backward(*(stored if ctx.needs_input_grad[0] else ()))


def _registered_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dx = dbias = None
    needs = ctx.needs_input_grad
    if needs[0]:
        W: Any = operands.build(ctx.saved_tensors, ctx.description)
        W = W.unrounded()
        if needs_plain_pytorch(torch.compiler.is_compiling()) is not None:
            dx = _plain(dy, W, None, not ctx.transposed)
        else:
            dx = torch.ops.lorafast.quantized_linear(
                dy, list(ctx.saved_tensors), operands.describe(W), None, not ctx.transposed
            )
    if ctx.has_bias and len(needs) > 3 and needs[3]:
        dbias = gradient_as_rows(dy).sum(0)
    return (dx, [None] * ctx.stored, None, dbias, None)[: len(needs)]


register(
    "quantized_linear",
    "(Tensor x, Tensor[] weight, str format, Tensor? bias=None, bool transposed=False) -> Tensor",
    _registered_run,
    _registered_fake,
)
register_autograd("quantized_linear", _registered_setup_context, _registered_backward)


def quantized_linear(
    x: Tensor, weight: Operand, bias: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """``y = x·Wᵀ + bias``; ``transposed``: ``y = x·W + bias``.

    Shapes: ``x [..., K]``, ``weight [N, K]``, an operand, ``bias [N]`` → ``y [..., N]``, all in the
    dtype of ``x``. Gradients flow into ``x`` and ``bias``; neither ``x`` nor W made dense is kept for
    the backward.

    Raises:
        ValueError, TypeError: a shape or a dtype doesn't fit, or a tensor of ``weight`` requires a
            gradient.
        BackendError: the forced backend can't serve the call.
    """
    check_no_dtensors("quantized_linear", x=x, weight=weight, bias=bias)
    _check(x, weight, bias, transposed)
    return _run(x, weight, bias, transposed)
