"""A bottleneck adapter, ``y = residual + scaling · (f(h·Dᵀ + d)·Uᵀ + u)``: contract and registration.

Kept for the backward are h and ``a = h·Dᵀ + d``; ``f(a)`` is made again. Eager code runs an
``autograd.Function`` over the plan for calls like this one; compiled code and modes see the registered
operation. Transforms, exported programs and sharded tensors get the reference, and a second derivative
is the reference's.
"""

from typing import Any

import torch
from torch import Tensor

from lorafast import reference
from lorafast.backends import forced, registry
from lorafast.backends.plan import Run
from lorafast.core.context import (
    alone,
    autocast_enabled,
    is_batched,
    needs_plain_pytorch,
    watched,
    without_autocast,
)
from lorafast.core.dtypes import wide
from lorafast.core.problem import WANTS, Problem
from lorafast.ops import flops
from lorafast.ops.bottleneck_checks import check_bottleneck
from lorafast.ops.calls import layouts_matter, where
from lorafast.ops.lora_linear import in_shape_of
from lorafast.ops.problems import (
    allows_tf32,
    as_rows,
    bottleneck_backward_problem,
    bottleneck_problem,
    gradient_as_rows,
    planned,
)
from lorafast.ops.registration import register, register_autograd
from lorafast.ops.unstrided import is_sharded
from lorafast.reference.bottleneck import pre_activation

_WANTS = WANTS["bottleneck_backward"]
_HALVES = (torch.float16, torch.bfloat16)
_KEPT = 4096


def bottleneck(
    h: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    scaling: float = 1.0,
    activation: str = "gelu",
    residual: Tensor | None = None,
) -> Tensor:
    """``y = residual + scaling · (f(h·Dᵀ + d)·Uᵀ + u)`` outside autocast, as in ``functional``."""
    if residual is h:
        residual = None
    compiling = torch.compiler.is_compiling()
    sharded = type(h) is not Tensor and is_sharded(h)
    if compiling or sharded or not alone():
        reason = "sharded tensors" if sharded else needs_plain_pytorch(compiling)
        if reason is not None:
            forced.check_plain_pytorch("bottleneck", reason)
        if reason is not None or compiling or watched():
            check_bottleneck(h, down, up, down_bias, up_bias, scaling, activation, residual)
        if reason is not None:
            return reference.bottleneck(
                h, down, up, down_bias, up_bias, scaling, activation, residual
            )
        if compiling or watched():
            if not compiling:
                flops.tell_counters()
            return _registered(h, down, up, down_bias, up_bias, scaling, activation, residual)
    call = _call(h, down, up, down_bias, up_bias, scaling, activation, residual)
    if call.differentiated:
        y: Tensor = _apply(call, h, down, up, down_bias, up_bias, scaling, activation, residual)
        return y
    return _forward(call, h, down, up, down_bias, up_bias, scaling, residual)[0]


class _Call:
    """What a call is like: checked, with the plan for it, and the plans for backwards that came."""

    __slots__ = ("backend", "backwards", "differentiated", "problem", "run")

    def __init__(self, backend: str | None, differentiated: bool, *arguments: Any) -> None:
        h, down, up, down_bias, up_bias, scaling, activation, residual = arguments
        check_bottleneck(h, down, up, down_bias, up_bias, scaling, activation, residual)
        wants = WANTS["bottleneck"] if differentiated else ("y",)
        onto = None if residual is None else as_rows(residual)
        self.problem = bottleneck_problem(
            as_rows(h), down, up, down_bias, up_bias, activation, onto, wants
        )
        self.backend, self.differentiated = backend, differentiated
        self.run = registry.choose(self.problem, backend).run
        self.backwards: dict[object, Run] = {}


_calls: dict[tuple[object, ...], _Call] = {}
registry.when_forgotten(_calls.clear)


def _call(h: Any, *others: Any) -> _Call:
    """That of such arguments, checked and planned once."""
    backend = forced.forced()
    down, up, down_bias, up_bias, scaling, activation, residual = others
    tensors = (h, down, up, down_bias, up_bias, residual)
    key: tuple[object, ...] | None
    try:
        differentiated = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in tensors
        )
        key = (
            backend, differentiated, activation, type(scaling), *[
                t if t is None else (t.shape, t.dtype, t.layout, t.is_cpu, type(t)) for t in tensors
            ],
        )  # fmt: skip
        if layouts_matter(h, backend):
            given = [t for t in tensors if t is not None]
            key = (*key, where(given), allows_tf32(h))
        call = _calls.get(key)
    except (AttributeError, RuntimeError, TypeError):
        key, call, differentiated = None, None, False  # no tensors: the checks say which
    if call is None:
        before = registry.times_forgotten()
        call = _Call(backend, differentiated, h, *others)
        if key is not None and before == registry.times_forgotten():
            if len(_calls) >= _KEPT:
                _calls.clear()
            _calls[key] = call
    return call


def _forward(
    call: _Call,
    h: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    scaling: float,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """``y`` in the shape of ``h`` and ``a [M, b]``."""
    onto = None if residual is None else as_rows(residual)
    y, a = call.run(as_rows(h), down, up, down_bias, up_bias, scaling, onto)
    return (y if h.dim() == 2 else in_shape_of(h, y)), a


def _save(ctx: Any, inputs: tuple[Any, ...], a: Tensor | None, needs: tuple[bool, ...]) -> None:
    """Keeps for the backward what the needed gradients take, so that all else may change meanwhile."""
    h, down, up, down_bias, _, scaling, activation, residual = inputs
    need_dh, need_dD, need_dU, need_dd, *_ = needs
    need_da = need_dh or need_dD or need_dd
    ctx.save_for_backward(
        h if need_dD else None,
        a if need_da or need_dU else None,
        down if need_dh else None,
        up if need_da else None,
    )
    ctx.down, ctx.down_bias = down, down_bias  # not their values: what a second derivative is for
    ctx.scaling, ctx.activation = scaling, activation
    ctx.own = residual is None


def _saved(ctx: Any) -> tuple[Tensor | None, ...]:
    try:
        saved: tuple[Tensor | None, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise RuntimeError(
            "h, down or up was changed in place after a bottleneck had kept it for its backward: "
            "write h = bottleneck(h), not h += ..., and step the optimizer only after the backward"
        ) from error
    return saved


def _wants(needs: tuple[bool, ...]) -> tuple[str, ...]:
    """The results that the forward's arguments need, in the order of ``WANTS``."""
    need_dh, need_dD, need_dU, need_dd, need_du, *_ = needs
    asked = (need_dh, need_dD, need_dd, need_dU, need_du)
    return tuple(name for name, need in zip(_WANTS, asked, strict=True) if need)


_Gradients = tuple[Tensor | None, ...]


def _in_order(dy: Tensor, found: _Gradients, needs: tuple[bool, ...]) -> _Gradients:
    """The gradients in the order of the forward's arguments."""
    dh, dD, dd, dU, du = found
    if dh is not None and dy.dim() != 2:
        dh = dh.view(*dy.shape[:-1], dh.shape[1])
    need_residual = len(needs) == _ARGUMENTS and needs[-1]
    return dh, dD, dU, dd, du, None, None, dy if need_residual else None


_ARGUMENTS = 8


def _differentiable(ctx: Any, dy: Tensor, wants: tuple[str, ...]) -> _Gradients:
    """By the reference, so that PyTorch can differentiate it once more."""
    h, a, down, up = _saved(ctx)
    rows = gradient_as_rows(dy)
    if a is not None and torch.is_grad_enabled():
        if h is None:
            raise RuntimeError(
                "a second derivative of bottleneck needs h, which is not kept when down has no "
                "gradient: let down require one"
            )
        # a was saved as a number; its dependence on h and D must be part of the graph.
        again = pre_activation(as_rows(h), ctx.down, ctx.down_bias)
        a = again + (a - again).detach()
    like = ctx.down
    problem = Problem(
        "bottleneck_backward", rows.shape[0], like.shape[1], rows.shape[1], like.shape[0], dy.dtype,
        like.dtype, dy.device, wants=wants, activation=ctx.activation, residual=not ctx.own,
    )  # fmt: skip
    run = registry.definition(problem).run
    found: _Gradients = run(rows, None if h is None else as_rows(h), a, down, up, ctx.scaling)
    return found


def _observed(ctx: Any, dy: Tensor, wants: tuple[str, ...]) -> _Gradients:
    """By the registered operation, as compiled code and modes have it."""
    h, a, down, up = _saved(ctx)
    found = torch.ops.lorafast.bottleneck_backward(
        as_rows(dy), None if h is None else as_rows(h), a, down, up, ctx.scaling, ctx.activation,
        not ctx.own, ",".join(wants), ctx.down.dtype,
    )  # fmt: skip
    return tuple(
        tensor if name in wants else None for name, tensor in zip(_WANTS, found, strict=True)
    )


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Any) -> Tensor:
        h, down, up, down_bias, up_bias, scaling, _, residual = inputs
        ctx.call = call
        y, a = _forward(call, h, down, up, down_bias, up_bias, scaling, residual)
        _save(ctx, inputs, a, ctx.needs_input_grad[1:])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        needs = ctx.needs_input_grad[1:]
        if not any(needs[:5]):
            return (None, *_in_order(dy, (None,) * 5, needs))
        if torch.compiler.is_compiling():  # compiled autograd, which traces this
            found = _observed(ctx, dy, _wants(needs))
        elif autocast_enabled(dy):
            with without_autocast(dy):
                found = _eager_backward(ctx, dy, needs)
        else:
            found = _eager_backward(ctx, dy, needs)
        return None, *_in_order(dy, found, needs)


def _eager_backward(ctx: Any, dy: Tensor, needs: tuple[bool, ...]) -> _Gradients:
    wants = _wants(needs)
    if torch.is_grad_enabled() or is_batched(dy):
        return _differentiable(ctx, dy, wants)
    call: _Call = ctx.call
    if not alone():
        with forced.use_backend(call.backend or registry.AUTO):
            # Of what began after the forward: its tangents, its batches.
            reason = needs_plain_pytorch()
            if reason is not None:
                forced.check_plain_pytorch("bottleneck_backward", reason)
                return _differentiable(ctx, dy, wants)
            if watched():
                flops.tell_counters()
                return _observed(ctx, dy, wants)
    h, a, down, up = _saved(ctx)
    rows, h = as_rows(dy), None if h is None else as_rows(h)
    key: object = (needs, type(dy))
    if layouts_matter(dy, call.backend):
        # Hooks of autograd's may have laid out otherwise what was saved.
        key = (needs, type(dy), where([t for t in (rows, h, a, down, up) if t is not None]))
    run = call.backwards.get(key)
    if run is None:
        problem = bottleneck_backward_problem(
            rows, h, a, down, up, ctx.activation, not ctx.own, wants, ctx.down.dtype
        )
        run = call.backwards[key] = registry.choose(problem, call.backend).run
    found: _Gradients = run(rows, h, a, down, up, ctx.scaling)
    return found


# As that of lora_linear.
_apply = super(torch.autograd.Function, _Bottleneck).apply


def _registered(
    h: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    scaling: float,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    if torch.compiler.is_compiling() and scaling != 1.0:
        # A float of a custom operation is a constant: another value would be another graph.
        if up.dtype in _HALVES:  # which would round the product
            down, up = down.float(), up.float()
            if down_bias is not None and up_bias is not None:
                down_bias, up_bias = down_bias.float(), up_bias.float()
        up, up_bias = up * scaling, None if up_bias is None else up_bias * scaling
        scaling = 1.0
    y: Tensor = torch.ops.lorafast.bottleneck(
        h, down, up, down_bias, up_bias, scaling, activation, residual
    )[0]
    return y


def _run(
    h: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    scaling: float = 1.0,
    activation: str = "gelu",
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_bottleneck(h, down, up, down_bias, up_bias, scaling, activation, residual)
    rows, onto = as_rows(h), None if residual is None else as_rows(residual)
    wants = WANTS["bottleneck"]
    problem = bottleneck_problem(rows, down, up, down_bias, up_bias, activation, onto, wants)
    y, a = planned(problem)(rows, down, up, down_bias, up_bias, scaling, onto)
    return (y if h.dim() == 2 else in_shape_of(h, y)), a


def _fake(
    h: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    scaling: float = 1.0,
    activation: str = "gelu",
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_bottleneck(h, down, up, down_bias, up_bias, scaling, activation, residual)
    M = 1
    for size in h.shape[:-1]:
        M = M * size
    y = h.new_empty((*h.shape[:-1], up.shape[0]))
    return y, h.new_empty((M, down.shape[0]), dtype=wide(h.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, a = output
    ctx.mark_non_differentiable(a)
    ctx.set_materialize_grads(False)  # no zeros for that of a
    # PyTorch leaves out trailing arguments that have their default.
    ctx.count = len(inputs)
    inputs = (*inputs, *_DEFAULTS[len(inputs) :])
    _save(ctx, inputs, a, _all_needs(ctx))


_DEFAULTS = (None, None, None, None, None, 1.0, "gelu", None)


def _all_needs(ctx: Any) -> tuple[bool, ...]:
    needs = tuple(ctx.needs_input_grad)
    return needs + (False,) * (_ARGUMENTS - len(needs))


def _backward(ctx: Any, dy: Tensor | None, _: None) -> _Gradients:
    needs = _all_needs(ctx)
    if dy is None:
        return (None,) * ctx.count
    found: _Gradients = (None,) * 5
    if any(needs[:5]):
        plain = needs_plain_pytorch(torch.compiler.is_compiling()) is not None
        by = _differentiable if plain or torch.is_grad_enabled() else _observed
        found = by(ctx, dy, _wants(needs))
    return _in_order(dy, found, needs)[: ctx.count]


_Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _run_backward(
    dy: Tensor,
    h: Tensor | None,
    a: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    scaling: float,
    activation: str,
    residual: bool,
    wants: str,
    dtype: torch.dtype,
) -> _Five:
    asked = tuple(wants.split(","))
    problem = bottleneck_backward_problem(dy, h, a, down, up, activation, residual, asked, dtype)
    found = planned(problem)(dy, h, a, down, up, scaling)
    dh, dD, dd, dU, du = (dy.new_empty(0) if t is None else t for t in found)
    return dh, dD, dd, dU, du


def _fake_backward(
    dy: Tensor,
    h: Tensor | None,
    a: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    scaling: float,
    activation: str,
    residual: bool,
    wants: str,
    dtype: torch.dtype,
) -> _Five:
    asked = wants.split(",")
    none = (0,)
    K = h.shape[1] if h is not None else down.shape[1] if down is not None else 0
    b = a.shape[1] if a is not None else 0
    sizes = {
        "dD": (b, K), "dd": (b,), "dU": (dy.shape[1], b), "du": (dy.shape[1],),
    }  # fmt: skip
    dD, dd, dU, du = (
        dy.new_empty(size if name in asked else none, dtype=dtype if name in asked else dy.dtype)
        for name, size in sizes.items()
    )
    return dy.new_empty((dy.shape[0], K) if "dh" in asked else none), dD, dd, dU, du


register(
    "bottleneck",
    "(Tensor h, Tensor down, Tensor up, Tensor? down_bias=None, Tensor? up_bias=None, "
    'float scaling=1.0, str activation="gelu", Tensor? residual=None) -> (Tensor y, Tensor a)',
    _run,
    _fake,
)
register_autograd("bottleneck", _setup_context, _backward)
register(
    "bottleneck_backward",
    "(Tensor dy, Tensor? h, Tensor? a, Tensor? down, Tensor? up, float scaling, str activation, "
    "bool residual, str wants, ScalarType dtype) -> "
    "(Tensor dh, Tensor dD, Tensor dd, Tensor dU, Tensor du)",
    _run_backward,
    _fake_backward,
)
