"""The LoRA linear layer: one backward formula, registered for tracing and wrapped for eager.

Under ``torch.compile``, and where a mode sees every operation, a call is the op
``lorafast::lora_linear``. Other eager code skips the registered op, whose Python costs more than a small
layer's arithmetic, and goes through an ``autograd.Function`` over the same formula. Under ``torch.func``
transforms, in forward mode and in exported programs, where neither works, it is the reference, which
PyTorch differentiates, batches and exports itself.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lorafast import reference
from lorafast.ops import aten, dispatch, flops
from lorafast.ops.checks import check_dropout, check_lora_linear
from lorafast.ops.context import (
    alone,
    autocast_enabled,
    dispatch_modes,
    function_modes,
    needs_plain_pytorch,
    traced,
    transforms_active,
    watched,
    without_autocast,
)
from lorafast.ops.registration import register, register_autograd

Gradients = tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, None, Tensor | None, None, None
]
_ARGUMENTS = 8
_HALVES = (torch.float16, torch.bfloat16)


def _rows(x: Tensor) -> Tensor:
    """``[..., K]`` as ``[M, K]``."""
    if x.dim() == 2:
        return x
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def _forward(
    backend: str | None,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``y`` in the shape of ``x`` and ``s [M, r]``."""
    rows = _rows(x)
    whole = dispatch.select_whole("lora_linear", backend, rows, lora_A, seed, weight, lora_B, bias)
    if whole is not None:
        y, s = whole(rows, weight, lora_A, lora_B, scaling, bias, dropout_p, seed)
    else:
        s = dispatch.select("shrink", backend, rows, lora_A, seed)(rows, lora_A, dropout_p, seed)
        y = dispatch.select("linear_expand", backend, rows, weight, s, lora_B, bias)(
            rows, weight, s, lora_B, scaling, bias
        )
    if x.dim() != 2:
        # Not a view: autograd forbids to change in place what a Function returns as one.
        y = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], lora_B.shape[0]))
    return y, s


def _backward(
    run: Any,
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    s: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    adapter_dtype: torch.dtype,
    needs: tuple[bool, ...],
) -> Gradients:
    """Every gradient that ``needs`` asks for, by the operations that ``run`` has.

    ``needs`` is in the order of the forward's arguments. A tensor may be None where no needed gradient
    takes it (``_save`` has the list).
    """
    need_dx, need_dweight, need_dA, need_dB, _, need_dbias, *_ = needs
    leading = dy.shape[:-1]
    dy = _rows(dy)
    rows = None if x is None else _rows(x)
    ds = dB = dA = dx = dweight = dbias = None
    if need_dx or need_dA:
        assert lora_B is not None
        if need_dB:
            ds, dB, *_ = run.expand_backward(dy, s, lora_B, scaling)
        else:
            ds = scaling * run.shrink(dy, lora_B.t())  # ds alone is a shrink
    elif need_dB:
        # dB alone is a shrink_backward, transposed; scaled before it is rounded to float16
        dB = run.shrink_backward(s, dy, 0.0, None, reference.wide(adapter_dtype)).t() * scaling
        dB = dB.to(adapter_dtype)
    if need_dA:
        dA = run.shrink_backward(ds, rows, dropout_p, seed, adapter_dtype)
    if need_dx:
        assert weight is not None
        assert lora_A is not None
        dx = run.linear_expand(dy, weight.t(), ds, lora_A.t(), 1.0, None, dropout_p, seed)
        dx = dx.view(*leading, weight.shape[1])
    if need_dweight:
        assert rows is not None
        dweight = dy.t() @ rows
    if need_dbias:
        dbias = dy.sum(0)
    return dx, dweight, dA, dB, None, dbias, None, None


def _whole_backward(
    backend: str | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Gradients | None:
    """``dx``, ``dA`` and ``dB`` in one call where a backend has it, else None."""
    leading, dy, rows = dy.shape[:-1], _rows(dy), _rows(x)
    whole = dispatch.select_whole(
        "lora_linear_backward", backend, rows, lora_A, seed, dy, weight, lora_B, s
    )
    if whole is None:
        return None
    dx, dA, dB, *_ = whole(dy, rows, weight, lora_A, lora_B, s, scaling, dropout_p, seed)
    return dx.view(*leading, dx.shape[1]), None, dA, dB, None, None, None, None


def _needs_whole(needs: tuple[bool, ...]) -> bool:
    """Whether a backward is asked for what one of a frozen layer with a trained adapter gives."""
    need_dx, need_dweight, need_dA, need_dB, _, need_dbias, *_ = needs
    return need_dx and need_dA and need_dB and not (need_dweight or need_dbias)


def _save(ctx: Any, inputs: tuple[Any, ...], s: Tensor) -> None:
    """Keeps for the backward what the needed gradients take, so that all else may change meanwhile."""
    x, weight, lora_A, lora_B, scaling, _, dropout_p, seed = inputs
    need_dx, need_dweight, need_dA, need_dB, *_ = ctx.needs_input_grad
    ctx.save_for_backward(
        x if need_dA or need_dweight else None,
        weight if need_dx else None,
        lora_A if need_dx else None,
        lora_B if need_dx or need_dA else None,
        s if need_dB else None,
        seed,
    )
    ctx.lora_A = lora_A  # not its values: what a second derivative is for
    ctx.scaling = scaling
    ctx.dropout_p = dropout_p


def _saved(ctx: Any) -> tuple[Any, ...]:
    """``x``, ``weight``, ``lora_A``, ``lora_B``, ``s`` and ``seed``, those that ``_save`` kept."""
    try:
        kept: tuple[Any, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise RuntimeError(
            "x, weight, lora_A or lora_B was changed in place after a LoRA layer had kept it for its "
            "backward: write x = x + layer(x), not x += layer(x), and step the optimizer only after "
            "the backward"
        ) from error
    return kept


def _differentiable_backward(ctx: Any, dy: Tensor, needs: tuple[bool, ...]) -> Gradients:
    """The formula on the reference operations, so that PyTorch can differentiate it once more."""
    x, weight, lora_A, lora_B, s, seed = _saved(ctx)
    if needs[3]:
        if x is not None:
            # s was saved as a number; its dependence on x and A must be part of the graph.
            again = reference.shrink(_rows(x), ctx.lora_A, ctx.dropout_p, seed)
            s = again + (s - again).detach()
        elif needs[0]:
            raise RuntimeError(
                "a second derivative of lora_linear needs x, which is not kept when lora_A has no "
                "gradient: let lora_A require one"
            )
    return _backward(
        reference, dy, x, weight, lora_A, lora_B, s, ctx.scaling, ctx.dropout_p, seed,
        ctx.lora_A.dtype, needs,
    )  # fmt: skip


def _observed_backward(ctx: Any, dy: Tensor, needs: tuple[bool, ...]) -> Gradients:
    """By registered operations, as compiled code and modes have it."""
    x, weight, lora_A, lora_B, s, seed = _saved(ctx)
    if _needs_whole(needs):
        dx, dA, dB = torch.ops.lorafast.lora_linear_backward(
            dy, x, weight, lora_A, lora_B, s, ctx.scaling, ctx.dropout_p, seed
        )
        return dx, None, dA, dB, None, None, None, None
    return _backward(
        torch.ops.lorafast, dy, x, weight, lora_A, lora_B, s, ctx.scaling, ctx.dropout_p, seed,
        ctx.lora_A.dtype, needs,
    )  # fmt: skip


_is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        ctx.backend = dispatch.forced()
        y, s = _forward(ctx.backend, *inputs)
        _save(ctx, inputs, s)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        needs = ctx.needs_input_grad
        if torch.compiler.is_compiling():  # compiled autograd, which traces this
            return _observed_backward(ctx, dy, needs)
        if autocast_enabled(dy):
            with without_autocast(dy):
                return _eager_backward(ctx, dy, needs)
        return _eager_backward(ctx, dy, needs)


def _eager_backward(ctx: Any, dy: Tensor, needs: tuple[bool, ...]) -> Gradients:
    if torch.is_grad_enabled():
        return _differentiable_backward(ctx, dy, needs)
    plain = _is_batched(dy)  # is_grads_batched, which no kernel knows
    if not plain and not alone():
        with dispatch.use_backend(ctx.backend or dispatch.AUTO):
            # Of what began after the forward: its tangents, its batches.
            reason = needs_plain_pytorch()
            if reason is not None:
                dispatch.check_plain_pytorch("lora_linear_backward", reason)
                plain = True
            elif watched():
                flops.tell_counters()
                return _observed_backward(ctx, dy, needs)
    x, weight, lora_A, lora_B, s, seed = _saved(ctx)
    if not plain and _needs_whole(needs):
        found = _whole_backward(
            ctx.backend, dy, x, weight, lora_A, lora_B, s, ctx.scaling, ctx.dropout_p, seed
        )
        if found is not None:
            return found
    return _backward(
        reference if plain else _EAGER[ctx.backend], dy, x, weight, lora_A, lora_B, s,
        ctx.scaling, ctx.dropout_p, seed, ctx.lora_A.dtype, needs,
    )  # fmt: skip


# Function.apply without its Python prologue, which unwraps what torch.func left behind: that never
# comes here.
_apply = super(torch.autograd.Function, _LoRALinear).apply


def _operations(backend: str | None) -> SimpleNamespace:
    """The four operations as plain functions on one backend."""

    def bind(operation: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            tensors = (a for a in arguments if isinstance(a, Tensor))
            return dispatch.select(operation, backend, *tensors)(*arguments)

        return run

    return SimpleNamespace(**{operation: bind(operation) for operation in dispatch.OPERATIONS})


_SMALL_NATIVE = 1 << 16
"""As ``aten.SMALL``, where the native kernels serve best: measured between 2^15 and 2^18."""


def is_small(x: Tensor, lora_A: Tensor, N: int, dropout_p: float, backend: str | None) -> bool:
    """Whether a layer is served by ``aten.small_lora_linear`` if ``backend`` is ``auto`` or ``aten``."""
    size = x.numel() * N
    return (
        size < aten.SMALL
        and not dropout_p
        and lora_A.dtype is x.dtype
        and (
            size < _SMALL_NATIVE
            or x.dtype is not torch.bfloat16
            or backend is not None
            or dispatch.automatic_choice("shrink", x, lora_A)[0] != "cpu"
        )
    )


_EAGER = {name: _operations(name) for name in (None, *dispatch.backend_names())}


def _registered_run(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p)
    check_dropout(dropout_p, seed)
    return _forward(dispatch.forced(), x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed)


def _registered_fake(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p)
    check_dropout(dropout_p, seed)
    M = 1
    for size in x.shape[:-1]:
        M = M * size
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, x.new_empty((M, lora_A.shape[0]), dtype=reference.wide(x.dtype))


def _registered_backward_run(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    backend = dispatch.forced()
    found = _whole_backward(
        backend, dy, x, weight, lora_A, lora_B, s, scaling, dropout_p, seed
    ) or _backward(
        _EAGER[backend], dy, x, weight, lora_A, lora_B, s, scaling, dropout_p, seed, lora_A.dtype,
        (True, False, True, True, False, False, False, False),
    )  # fmt: skip
    dx, _, dA, dB, *_ = found
    assert dx is not None
    assert dA is not None
    assert dB is not None
    return dx, dA, dB


def _registered_backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = dy.new_empty((*dy.shape[:-1], weight.shape[1]))
    return dx, lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)


def _registered_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, s = output
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)  # no zeros for that of s
    _save(ctx, inputs, s)


def _registered_backward(ctx: Any, dy: Tensor | None, _: None) -> Gradients:
    if dy is None:
        return None, None, None, None, None, None, None, None
    # PyTorch leaves out trailing arguments that have their default: no bias, no dropout.
    needs = (*ctx.needs_input_grad, False, False, False)[:_ARGUMENTS]
    compiling = torch.compiler.is_compiling()
    if torch.is_grad_enabled() or needs_plain_pytorch(compiling) is not None:
        return _differentiable_backward(ctx, dy, needs)
    return _observed_backward(ctx, dy, needs)


register(
    "lora_linear",
    "(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor? bias=None, "
    "float dropout_p=0.0, Tensor? seed=None) -> (Tensor y, Tensor s)",
    _registered_run,
    _registered_fake,
)
register_autograd("lora_linear", _registered_setup_context, _registered_backward)
register(
    "lora_linear_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor s, float scaling, "
    "float dropout_p=0.0, Tensor? seed=None) -> (Tensor dx, Tensor dA, Tensor dB)",
    _registered_backward_run,
    _registered_backward_fake,
)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """``y = x·Wᵀ + scaling · (drop(x)·Aᵀ)·Bᵀ + bias`` on checked arguments, outside autocast."""
    compiling = torch.compiler.is_compiling()
    # As ``alone`` asks, without the call.
    if (
        compiling
        or transforms_active()
        or forward_ad._current_level >= 0
        or traced()
        or dispatch_modes()
        or function_modes()
    ):
        reason = needs_plain_pytorch(compiling)
        if reason is not None:
            dispatch.check_plain_pytorch("lora_linear", reason)
            return reference.lora_linear(
                x, weight, lora_A, lora_B, scaling, bias, dropout_p=dropout_p, seed=seed
            )
        if compiling or watched():
            if compiling:
                # A float of a custom operation is a constant: another value would be another graph.
                if lora_B.dtype in _HALVES:  # which would round the product
                    lora_A, lora_B = lora_A.float(), lora_B.float()
                lora_B, scaling = lora_B * scaling, 1.0
            else:
                flops.tell_counters()
            return torch.ops.lorafast.lora_linear(
                x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed
            )[0]
    backend = dispatch.forced()
    N = lora_B.shape[0]
    if (backend is None or backend == "aten") and is_small(x, lora_A, N, dropout_p, backend):
        if x.dim() == 2:
            return aten.small_lora_linear(x, weight, lora_A, lora_B, scaling, bias)
        y = aten.small_lora_linear(_rows(x), weight, lora_A, lora_B, scaling, bias)
        return y.view(*x.shape[:-1], N)
    if torch.is_grad_enabled():
        return _apply(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed)
    return _forward(backend, x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed)[0]
