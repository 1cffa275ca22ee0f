"""A frozen linear layer with a vector, (IA)³: ``y = l ⊙ (x·Wᵀ + b)`` or ``y = (l ⊙ x)·Wᵀ + b``.

    y is scaled:  dx = (l ⊙ dy)·W,  dl = Σ dy ⊙ z,  z = x·Wᵀ + b
    x is scaled:  dx = l ⊙ (dy·W),  dl = Σ x ⊙ (dy·W)

Kept for dl is z, or x where that is scaled. y itself would not do for z: it is 0 wherever l is. z is an
output of the ``autograd.Function``, so that a second derivative flows through it and needs no x.

A quantized W, one that is trained, transforms, autocast and sharded tensors get ``F.linear`` and
``scaled``, and so do calls so small that an ``autograd.Function`` takes the host longer than it saves.
"""

from typing import Any

import torch
import torch.nn.functional as F
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
from lorafast.core.problem import SCALED_OPERATIONS, WANTS, is_plain
from lorafast.operands import Weight
from lorafast.ops import flops
from lorafast.ops.calls import layouts_matter, where
from lorafast.ops.checks import check_scaled_linear
from lorafast.ops.lora_linear import in_shape_of
from lorafast.ops.problems import (
    allows_tf32,
    as_rows,
    scaled_linear_backward_problem,
    scaled_linear_problem,
)
from lorafast.ops.quantized_linear import quantized_linear
from lorafast.ops.registration import register, register_autograd
from lorafast.ops.scaled import LARGE, scaled
from lorafast.ops.unstrided import is_sharded

_FORWARD, _BACKWARD = SCALED_OPERATIONS
_WANTS = WANTS[_BACKWARD]
_KEPT = 4096
_Pair = tuple[Tensor | None, Tensor | None]


def scaled_linear(
    x: Tensor,
    weight: Weight,
    scale: Tensor,
    bias: Tensor | None = None,
    scales_input: bool = False,
) -> Tensor:
    """``y = l ⊙ (x·Wᵀ + b)``, with ``scales_input`` ``y = (l ⊙ x)·Wᵀ + b``.

    Shapes: ``x [..., K]``, ``weight [N, K]``, a tensor or an operand of another format, ``bias [N]``,
    ``scale [N]``, with ``scales_input`` ``[K]`` → ``y [..., N]`` in the dtype of ``x``. dx and dl are
    computed here; where W or the bias is trained PyTorch differentiates its own calls. A forced backend
    that has no such operation leaves it to the fastest one that has.

    Raises:
        TypeError, ValueError: arguments that make no such layer, each named.
        BackendError: the forced backend has the operation, and can't serve the call.
    """
    if not isinstance(weight, Tensor) or autocast_enabled(x) or _trained(weight, bias):
        return _composed(x, weight, scale, bias, scales_input)
    compiling = torch.compiler.is_compiling()
    if compiling or not alone():
        reason = needs_plain_pytorch(compiling)
        if reason is not None:
            forced.check_plain_pytorch(_FORWARD, reason)
            return _composed(x, weight, scale, bias, scales_input)
        if any(map(is_sharded, (x, weight, scale))):
            return _composed(x, weight, scale, bias, scales_input)
        if compiling or watched():
            return _registered(x, weight, scale, bias, scales_input)
    if not is_plain(x, weight, scale, bias):
        check_scaled_linear(x, weight, scale, bias, scales_input)
        return _composed(x, weight, scale, bias, scales_input)
    call = _call(x, weight, scale, bias, scales_input)
    if call.composed:
        return _composed(x, weight, scale, bias, scales_input)
    if call.differentiated:
        y: Tensor = _apply(call, x, weight, scale, bias, scales_input)[0]
        return y
    return _forward(call.run, x, weight, scale, bias)[0]


def _registered(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, scales_input: bool
) -> Tensor:
    check_scaled_linear(x, weight, scale, bias, scales_input)
    if x.is_cpu and forced.forced() is None:
        return _composed(x, weight, scale, bias, scales_input)
    if not torch.compiler.is_compiling():
        flops.tell_counters()
    keep = not scales_input and torch.is_grad_enabled() and scale.requires_grad
    y: Tensor = torch.ops.lorafast.scaled_linear(x, weight, scale, bias, scales_input, keep)[0]
    return y


def _trained(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a gradient of W or the bias is asked for."""
    return torch.is_grad_enabled() and (
        weight.requires_grad or (bias is not None and bias.requires_grad)
    )


def _backend() -> str | None:
    """The forced backend, where it has the operation."""
    name = forced.forced()
    if name in registry.names() and _FORWARD not in registry.get(name).operations:
        return None
    return name  # of one that is registered no more ``choose`` says so


def _composed(
    x: Tensor, weight: Weight, scale: Tensor, bias: Tensor | None, scales_input: bool
) -> Tensor:
    """One product and one pass, each an operation of its own."""
    if scales_input:
        x = scaled(x, scale, fresh=False)
    if isinstance(weight, Tensor):
        y = F.linear(x, weight, bias)
    else:
        y = quantized_linear(x.to(weight.dtype), weight, bias).to(x.dtype)
    return y if scales_input else scaled(y, scale)


class _Call:
    """What a call is like: checked, with the plan for it, and the plans for backwards that came."""

    __slots__ = ("backend", "backwards", "composed", "differentiated", "run")

    def __init__(self, backend: str | None, differentiated: bool, *arguments: Any) -> None:
        x, weight, scale, bias, scales_input = arguments
        check_scaled_linear(x, weight, scale, bias, scales_input)
        self.backend, self.differentiated = backend, differentiated
        self.composed = backend is None and _is_small(x, weight, scales_input, differentiated)
        if self.composed:
            return
        keep = differentiated and scale.requires_grad and not scales_input
        problem = scaled_linear_problem(
            as_rows(x), weight, scale, bias, scales_input, ("y", "z") if keep else ("y",)
        )
        self.run: Run = registry.choose(problem, backend).run
        self.backwards: dict[object, Run] = {}


def _is_small(x: Tensor, weight: Tensor, scales_input: bool, differentiated: bool) -> bool:
    """Whether PyTorch's own calls take less time: on a CPU, where nothing is fused, and on a GPU with
    an ``autograd.Function`` around what memory is done with before the host is."""
    if x.is_cpu:
        return True
    width = weight.shape[1 if scales_input else 0]
    return differentiated and x.numel() // max(x.shape[-1], 1) * width < LARGE


_calls: dict[tuple[object, ...], _Call] = {}
registry.when_forgotten(_calls.clear)


def _call(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    scales_input: bool,
) -> _Call:
    """That of such arguments, checked and planned once."""
    backend = _backend()
    differentiated = torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad)
    key: tuple[object, ...] = (
        backend, differentiated, differentiated and scale.requires_grad, scales_input,
        *[t if t is None else (t.shape, t.dtype, t.is_cpu) for t in (x, weight, scale, bias)],
    )  # fmt: skip
    if layouts_matter(x, backend):
        given = [t for t in (x, weight, scale, bias) if t is not None]
        key = (*key, where(given), allows_tf32(x))
    call = _calls.get(key)
    if call is None:
        before = registry.times_forgotten()
        call = _Call(backend, differentiated, x, weight, scale, bias, scales_input)
        if before == registry.times_forgotten():
            if len(_calls) >= _KEPT:
                _calls.clear()
            _calls[key] = call
    return call


def _forward(
    run: Run, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """``y`` in the shape of ``x``, and ``z [M, N]``."""
    y, z = run(as_rows(x), weight, scale, bias)
    return (y if x.dim() == 2 else in_shape_of(x, y)), z


def _save(ctx: Any, inputs: tuple[Any, ...], z: Tensor | None, needs: tuple[bool, ...]) -> None:
    """Keeps what the needed gradients take."""
    x, weight, scale, _, scales_input, *_ = inputs
    need_dx, need_dscale = needs[0], needs[2]
    kept = (x if scales_input else z) if need_dscale else None
    ctx.save_for_backward(kept, weight if need_dx or scales_input else None, scale)
    ctx.scales_input = scales_input
    ctx.set_materialize_grads(False)  # no zeros for that of z


def _wants(needs: tuple[bool, ...]) -> tuple[str, ...]:
    """The results that the forward's arguments need."""
    return tuple(name for name, need in zip(_WANTS, (needs[0], needs[2]), strict=True) if need)


def _gradients(ctx: Any, dy: Tensor | None, dz: Tensor | None, needs: tuple[bool, ...]) -> _Pair:
    """``dx [M, K]`` and ``dscale`` by the reference, which PyTorch can differentiate once more."""
    kept, weight, scale = ctx.saved_tensors
    dx = dscale = None
    if dy is not None:
        dy = as_rows(dy)
        if needs[0]:
            dx = reference.scaled_dx(dy, weight, scale, ctx.scales_input)
        if needs[2]:
            rows = as_rows(kept)
            dscale = reference.scaled_dscale(dy, rows, weight, scale.dtype, ctx.scales_input)
    if dz is not None and needs[0]:
        through_z = dz @ weight
        dx = through_z if dx is None else dx + through_z
    return dx, dscale


def _observed(ctx: Any, dy: Tensor, needs: tuple[bool, ...]) -> _Pair:
    """By the registered operation, as compiled code and modes have it."""
    kept, weight, scale = ctx.saved_tensors
    wants = _wants(needs)
    found = torch.ops.lorafast.scaled_linear_backward(
        as_rows(dy), None if kept is None else as_rows(kept), weight, scale, ctx.scales_input,
        ",".join(wants),
    )  # fmt: skip
    dx, dscale = (t if n in wants else None for n, t in zip(_WANTS, found, strict=True))
    return dx, dscale


def _eager(ctx: Any, dy: Tensor, needs: tuple[bool, ...]) -> _Pair:
    """By the plan."""
    call: _Call = ctx.call
    if not alone():
        with forced.use_backend(call.backend or registry.AUTO):
            # Of what began after the forward: its tangents, its batches.
            reason = needs_plain_pytorch()
            if reason is not None:
                forced.check_plain_pytorch(_BACKWARD, reason)
                return _gradients(ctx, dy, None, needs)
            if watched():
                flops.tell_counters()
                return _observed(ctx, dy, needs)
    kept, weight, scale = ctx.saved_tensors
    rows = as_rows(dy)
    kept = None if kept is None else as_rows(kept)
    key: object = needs
    if layouts_matter(dy, call.backend):
        # Hooks of autograd's may have laid out otherwise what was saved.
        key = (needs, where([t for t in (rows, kept, weight, scale) if t is not None]))
    run = call.backwards.get(key)
    if run is None:
        problem = scaled_linear_backward_problem(
            rows, kept, weight, scale, ctx.scales_input, _wants(needs)
        )
        run = call.backwards[key] = registry.choose(problem, call.backend).run
    found: _Pair = run(rows, kept, weight, scale)
    return found


class _ScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        x, weight, scale, bias, _ = inputs
        ctx.call = call
        y, z = _forward(call.run, x, weight, scale, bias)
        _save(ctx, inputs, z, ctx.needs_input_grad[1:])
        ctx.rows = y.shape[:-1]
        return y, z

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None) -> Any:
        needs = ctx.needs_input_grad[1:]
        if dy is None or dz is not None or torch.is_grad_enabled() or is_batched(dy):
            found = _gradients(ctx, dy, dz, needs)
        elif torch.compiler.is_compiling():  # compiled autograd, which traces this
            found = _observed(ctx, dy, needs)
        else:
            with without_autocast(dy):
                found = _eager(ctx, dy, needs)
        return None, *_shaped(ctx, found)


def _shaped(ctx: Any, found: _Pair) -> tuple[Tensor | None, ...]:
    """The gradients in the order of the forward's arguments, dx in the shape of x."""
    dx, dscale = found
    if dx is not None and len(ctx.rows) != 1:
        dx = dx.view(*ctx.rows, dx.shape[1])
    return dx, None, dscale, None, None


# As that of lora_linear.
_apply = super(torch.autograd.Function, _ScaledLinear).apply


def _run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    scales_input: bool = False,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    check_scaled_linear(x, weight, scale, bias, scales_input)
    wants = ("y", "z") if keep else ("y",)
    problem = scaled_linear_problem(as_rows(x), weight, scale, bias, scales_input, wants)
    y, z = _forward(registry.choose(problem, _backend()).run, x, weight, scale, bias)
    return y, x.new_empty(0) if z is None else z


def _fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    scales_input: bool = False,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    check_scaled_linear(x, weight, scale, bias, scales_input)
    N, M = weight.shape[0], 1
    for size in x.shape[:-1]:
        M = M * size
    return x.new_empty((*x.shape[:-1], N)), x.new_empty((M, N) if keep else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    # PyTorch leaves out trailing arguments that have their default.
    ctx.count = len(inputs)
    inputs = (*inputs, *(None, False, False)[len(inputs) - 3 :])
    y, z = output
    ctx.keeps = inputs[-1]
    _save(ctx, inputs, z, ctx.needs_input_grad)
    ctx.rows = y.shape[:-1]


def _backward(ctx: Any, dy: Tensor | None, dz: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    dz = dz if ctx.keeps else None
    plain = needs_plain_pytorch(torch.compiler.is_compiling()) is not None
    if dy is None or dz is not None or plain or torch.is_grad_enabled():
        found = _gradients(ctx, dy, dz, needs)
    else:
        found = _observed(ctx, dy, needs)
    return (*_shaped(ctx, found), None)[: ctx.count]


def _run_backward(
    dy: Tensor,
    kept: Tensor | None,
    weight: Tensor | None,
    scale: Tensor,
    scales_input: bool,
    wants: str,
) -> tuple[Tensor, Tensor]:
    asked = tuple(wants.split(","))
    problem = scaled_linear_backward_problem(dy, kept, weight, scale, scales_input, asked)
    found = registry.choose(problem, _backend()).run(dy, kept, weight, scale)
    dx, dscale = (dy.new_empty(0) if t is None else t for t in found)
    return dx, dscale


def _fake_backward(
    dy: Tensor,
    kept: Tensor | None,
    weight: Tensor | None,
    scale: Tensor,
    scales_input: bool,
    wants: str,
) -> tuple[Tensor, Tensor]:
    asked = wants.split(",")
    dx, dscale = dy.new_empty(0), dy.new_empty(0)
    if "dx" in asked:
        assert weight is not None
        dx = dy.new_empty((dy.shape[0], weight.shape[1]))
    if "dscale" in asked:
        dscale = torch.empty_like(scale)
    return dx, dscale


register(
    _FORWARD,
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, bool scales_input=False, "
    "bool keep=False) -> (Tensor y, Tensor z)",
    _run,
    _fake,
)
register_autograd(_FORWARD, _setup_context, _backward)
register(
    _BACKWARD,
    "(Tensor dy, Tensor? kept, Tensor? weight, Tensor scale, bool scales_input, str wants) -> "
    "(Tensor dx, Tensor dscale)",
    _run_backward,
    _fake_backward,
)
