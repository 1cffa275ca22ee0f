"""The LoRA linear layer: one backward formula, registered for tracing and wrapped for eager.

Under ``torch.compile``, and where a mode sees every operation, a call is the op
``lorafast::lora_linear``. Other eager code skips the registered op, whose Python costs more than a small
layer's arithmetic: a call like one that was checked and planned before runs the plan of that one, which
PyTorch differentiates where it can, else an ``autograd.Function`` over the same formula. Under
``torch.func`` transforms, in forward mode and in exported programs, where neither works, it is the
reference, which PyTorch differentiates, batches and exports itself.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from lorafast import operands, reference
from lorafast.backends import composed, forced, registry
from lorafast.backends.plan import Run
from lorafast.core.context import (
    alone,
    autocast_enabled,
    dispatch_modes,
    function_modes,
    is_batched,
    needs_plain_pytorch,
    traced,
    transforms_active,
    watched,
    without_autocast,
)
from lorafast.core.dtypes import wide
from lorafast.core.problem import WANTS, Problem, expand_wants
from lorafast.operands import Weight
from lorafast.ops import flops, unstrided
from lorafast.ops.calls import Call, Memory, calls, first_call, layouts_matter, like_of, where
from lorafast.ops.checks import check_dropout, check_lora_linear
from lorafast.ops.problems import (
    FROZEN,
    allows_tf32,
    as_rows,
    backward_problem,
    gradient_as_rows,
    layer_problem,
    planned,
    saved_problem,
)
from lorafast.ops.registration import register, register_autograd

Gradients = tuple[Tensor | None, Any, Tensor | None, Tensor | None, None, Tensor | None, None, None]
_HALVES = (torch.float16, torch.bfloat16)
_WANTS = WANTS["lora_linear_backward"]
_ARGUMENTS = 8


def in_shape_of(x: Tensor, y: Tensor) -> Tensor:
    """``y [M, N]`` with the leading dimensions of ``x``."""
    # Not a view: autograd forbids to change in place what a Function returns as one.
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1]))


def lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    memory: Memory | None = None,
) -> Tensor:
    """``y = x·Wᵀ + scaling · (drop(x)·Aᵀ)·Bᵀ + bias`` outside autocast; as ``functional.lora_linear``,
    with the seed of the mask given, and the ``memory`` of whoever calls it again and again."""
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
        y = _surrounded(compiling, x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed)
        if y is not None:
            return y
    backend = forced.forced()
    key: Any = None
    call = None
    like: object = None
    try:
        if memory is None:
            like = like_of(weight, lora_A, lora_B, bias)
        else:
            tensors, like = memory.kept
            if tensors != (id(weight), id(lora_A), id(lora_B), id(bias)):
                like = memory.keep(weight, lora_A, lora_B, bias)
        on_cpu = x.is_cpu
        key = (
            x.shape, x.dtype, x.layout, on_cpu, type(x), like, dropout_p, type(scaling), backend
        )  # fmt: skip
        if backend is not None or not on_cpu:
            matrices = (x, *operands.stored(weight), lora_A, lora_B)
            key = (*key, where(matrices), like_of(weight, lora_A, lora_B, bias), allows_tf32(x))
        call = calls[key]
    except KeyError:
        pass
    except (AttributeError, RuntimeError, TypeError):
        key = None  # no layer's arguments, or those of a tensor that has no such size or address
    if (
        memory is not None
        and key is not None
        and (
            call is None
            or not call.differentiable  # PyTorch's own calls refuse what doesn't fit
            or (call.inference is not None and not torch.is_grad_enabled())
            or weight.numel() != call.elements  # but broadcast
            or (bias is not None and bias.shape != call.bias_shape)
        )
        and memory.keep(weight, lora_A, lora_B, bias) is not like
    ):
        return lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed, memory)
    if call is None:
        call = first_call(key, x, weight, lora_A, lora_B, scaling, bias, dropout_p, backend)
        if call is None:
            return unstrided.lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed)
    if call.inference is not None and not torch.is_grad_enabled():
        call = call.inference
    if call.differentiable:
        try:
            if call.matrix:
                return call.run(x, weight, lora_A, lora_B, scaling, bias, 0.0, None)
            y = call.run(as_rows(x), weight, lora_A, lora_B, scaling, bias, 0.0, None)
        except RuntimeError:
            # A tensor may have been given another shape or dtype in place.
            check_lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p)
            if memory is None or memory.keep(weight, lora_A, lora_B, bias) is like:
                raise
            return lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed, memory)
        return y.view(*x.shape[:-1], y.shape[1])
    if call.operand is not None and call.operand != weight.layout:
        key = (*key, weight.layout)  # what they depend on too; a tensor needn't be asked
        call = calls.get(key) or first_call(
            key, x, weight, lora_A, lora_B, scaling, bias, dropout_p, backend
        )
        assert call is not None
    if torch.is_grad_enabled():
        return _apply(call, x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed)
    return _forward(call, x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed)[0]


def _forward(
    call: Call,
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``y`` in the shape of ``x`` and ``s [M, r]``."""
    if call.matrix:
        y, s = call.run(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed)
        return y, s
    y, s = call.run(as_rows(x), weight, lora_A, lora_B, scaling, bias, dropout_p, seed)
    return in_shape_of(x, y), s


def _surrounded(
    compiling: bool,
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor | None:
    """The layer in compiled code, under transforms, tracing and modes; None if it is none of these."""
    reason = needs_plain_pytorch(compiling)
    if reason is None and not compiling and not watched():
        return None
    has_rows = check_lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p)
    watched_or_drops = dropout_p or (reason is None and not compiling)
    if not has_rows or (type(x) is not Tensor and watched_or_drops and unstrided.is_sharded(x)):
        return unstrided.lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed)
    if reason is not None:
        forced.check_plain_pytorch("lora_linear", reason)
        dense = operands.as_dense(weight)
        return reference.lora_linear(
            x, dense, lora_A, lora_B, scaling, bias, dropout_p=dropout_p, seed=seed,
            activations=operands.activations(x, weight),
        )  # fmt: skip
    if compiling:
        # A float of a custom operation is a constant: another value would be another graph.
        if lora_B.dtype in _HALVES:  # which would round the product
            lora_A, lora_B = lora_A.float(), lora_B.float()
        lora_B, scaling = lora_B * scaling, 1.0
    else:
        flops.tell_counters()
    y: Tensor = torch.ops.lorafast.lora_linear(
        x, operands.stored(weight), operands.describe(weight), lora_A, lora_B, scaling, bias,
        dropout_p, seed,
    )[0]  # fmt: skip
    return y


def _save(ctx: Any, inputs: tuple[Any, ...], s: Tensor, needs: tuple[bool, ...]) -> None:
    """Keeps for the backward what the needed gradients take, so that all else may change meanwhile."""
    x, weight, lora_A, lora_B, scaling, _, dropout_p, seed = inputs
    need_dx, need_dweight, need_dA, need_dB, *_ = needs
    if isinstance(weight, Tensor):
        ctx.description, stored = operands.DENSE, [weight]
    else:
        ctx.description, stored = operands.describe(weight), operands.stored(weight)
    ctx.save_for_backward(
        x if need_dA or need_dweight else None,
        lora_A if need_dx else None,
        lora_B if need_dx or need_dA else None,
        s if need_dB else None,
        seed,
        *(stored if need_dx else ()),
    )
    ctx.lora_A = lora_A  # not its values: what a second derivative is for
    ctx.scaling = scaling
    ctx.dropout_p = dropout_p


def _saved(ctx: Any) -> tuple[Any, ...]:
    """``x``, ``weight``, ``lora_A``, ``lora_B``, ``s`` and ``seed``, those that ``_save`` kept."""
    x, lora_A, lora_B, s, seed, *stored = unpacked(ctx)
    weight = operands.build(stored, ctx.description) if stored else None
    return x, weight, lora_A, lora_B, s, seed


def unpacked(ctx: Any) -> tuple[Any, ...]:
    """What a layer saved for its backward."""
    try:
        saved: tuple[Any, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise RuntimeError(
            "x, weight, lora_A or lora_B was changed in place after a LoRA layer had kept it for its "
            "backward: write x = x + layer(x), not x += layer(x), and step the optimizer only after "
            "the backward"
        ) from error
    return saved


def _wants(needs: tuple[bool, ...]) -> tuple[str, ...]:
    """The results that the forward's arguments need, in the order of ``WANTS``."""
    need_dx, need_dweight, need_dA, need_dB, _, need_dbias, *_ = needs
    asked = (need_dx, need_dweight, need_dA, need_dB, need_dbias)
    return tuple(name for name, need in zip(_WANTS, asked, strict=True) if need)


def _run_backward(ctx: Any, run: Run, dy: Tensor, saved: tuple[Any, ...]) -> Gradients:
    """The gradients in the order of the forward's arguments."""
    x, weight, lora_A, lora_B, s, seed = saved
    dx, dweight, dA, dB, dbias = run(
        gradient_as_rows(dy), None if x is None else as_rows(x), weight, lora_A, lora_B, s,
        ctx.scaling, ctx.dropout_p, seed,
    )  # fmt: skip
    if dx is not None and dy.dim() != 2:
        dx = dx.view(*dy.shape[:-1], dx.shape[1])
    return dx, dweight, dA, dB, None, dbias, None, None


def _reference_backward(wants: tuple[str, ...], adapter_dtype: torch.dtype) -> Run:
    """The formula on the reference operations."""
    device = torch.device("cpu")  # the reference asks for none, nor for sizes
    problem = Problem(
        "lora_linear_backward", 0, 0, 0, 0, adapter_dtype, adapter_dtype, device, wants=wants
    )
    return registry.definition(problem).run


def _differentiable_backward(ctx: Any, dy: Tensor, wants: tuple[str, ...]) -> Gradients:
    """The formula on the reference operations, so that PyTorch can differentiate it once more."""
    x, weight, lora_A, lora_B, s, seed = _saved(ctx)
    if "dB" in wants:
        if x is not None:
            # s was saved as a number; its dependence on x and A must be part of the graph.
            again = reference.shrink(as_rows(x), ctx.lora_A, ctx.dropout_p, seed)
            s = again + (s - again).detach()
        elif "dx" in wants:
            raise RuntimeError(
                "a second derivative of lora_linear needs x, which is not kept when lora_A has no "
                "gradient: let lora_A require one"
            )
    run = _reference_backward(wants, ctx.lora_A.dtype)
    return _run_backward(ctx, run, dy, (x, weight, lora_A, lora_B, s, seed))


def _observed_backward(ctx: Any, dy: Tensor, wants: tuple[str, ...]) -> Gradients:
    """By registered operations, as compiled code and modes have it."""
    saved = _saved(ctx)
    if not set(FROZEN) <= set(wants):
        run = composed.backward(_registered_runs(wants, ctx.lora_A.dtype, ctx.description), wants)
        return _run_backward(ctx, run, dy, saved)
    x, weight, lora_A, lora_B, s, seed = saved
    dx, dA, dB = torch.ops.lorafast.lora_linear_backward(
        dy, x, operands.stored(weight), ctx.description, lora_A, lora_B, s, ctx.scaling,
        ctx.dropout_p, seed,
    )  # fmt: skip
    rows = as_rows(dy)
    dweight = rows.t() @ as_rows(x) if "dweight" in wants else None
    dbias = rows.sum(0) if "dbias" in wants else None
    return dx, dweight, dA, dB, None, dbias, None, None


def _registered_runs(
    wants: tuple[str, ...], adapter_dtype: torch.dtype, description: str
) -> dict[str, Run]:
    """The registered operations, as plans have them."""
    library = torch.ops.lorafast
    first = expand_wants(wants)

    def expand_backward(
        dy: Tensor, s: Tensor | None, lora_B: Tensor | None, scaling: float
    ) -> tuple[Tensor | None, ...]:
        found = library.expand_backward(dy, s, lora_B, scaling, ",".join(first), adapter_dtype)
        return tuple(
            tensor if name in first else None
            for name, tensor in zip(WANTS["expand_backward"], found, strict=True)
        )

    def shrink_backward(ds: Tensor, x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
        dA: Tensor = library.shrink_backward(ds, x, dropout_p, seed, adapter_dtype)
        return dA

    def linear_expand(
        dy: Tensor, weight: Weight, ds: Tensor, lora_A_t: Tensor, *rest: Any
    ) -> Tensor:
        stored = operands.stored(weight)
        dx: Tensor = library.linear_expand(dy, stored, description, ds, lora_A_t, *rest, True)
        return dx

    runs: dict[str, Run] = {"shrink_backward": shrink_backward, "linear_expand": linear_expand}
    return runs | ({"expand_backward": expand_backward} if first else {})


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Any) -> Tensor:
        ctx.call = call
        y, s = _forward(call, *inputs)
        _save(ctx, inputs, s, ctx.needs_input_grad[1:])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return None, *layer_backward(ctx, dy, ctx.needs_input_grad[1:])


def layer_backward(ctx: Any, dy: Tensor, needs: tuple[bool, ...]) -> Gradients:
    """The gradients that are needed, in the order of the forward's arguments."""
    if torch.compiler.is_compiling():  # compiled autograd, which traces this
        return _observed_backward(ctx, dy, _wants(needs))
    if autocast_enabled(dy):
        with without_autocast(dy):
            return _eager_backward(ctx, dy, needs)
    return _eager_backward(ctx, dy, needs)


def _eager_backward(ctx: Any, dy: Tensor, needs: tuple[bool, ...]) -> Gradients:
    if torch.is_grad_enabled():
        return _differentiable_backward(ctx, dy, _wants(needs))
    call: Call = ctx.call
    plain = is_batched(dy)  # is_grads_batched, which no kernel knows
    if not plain and not alone():
        with forced.use_backend(call.backend or registry.AUTO):
            # Of what began after the forward: its tangents, its batches.
            reason = needs_plain_pytorch()
            if reason is not None:
                forced.check_plain_pytorch("lora_linear_backward", reason)
                plain = True
            elif watched():
                flops.tell_counters()
                return _observed_backward(ctx, dy, _wants(needs))
    saved = _saved(ctx)
    if plain:
        run = _reference_backward(_wants(needs), ctx.lora_A.dtype)
    else:
        run = _planned_backward(call, dy, needs, saved)
    return _run_backward(ctx, run, dy, saved)


def _planned_backward(
    call: Call, dy: Tensor, needs: tuple[bool, ...], saved: tuple[Any, ...]
) -> Run:
    """What runs the backward of ``call``, on the backend of its forward."""
    layouts = layouts_matter(dy, call.backend)
    key: object = (needs, type(dy))
    if layouts:
        # Hooks of autograd's may have laid out otherwise what was saved.
        x, weight, lora_A, lora_B, s, _ = saved
        stored = () if weight is None else operands.stored(weight)
        read = [t for t in (as_rows(dy), x, *stored, lora_A, lora_B, s) if t is not None]
        key = (needs, type(dy), where(read))
    run = call.backwards.get(key)
    if run is None:
        problem = backward_problem(call.problem, _wants(needs), as_rows(dy), layouts)
        if layouts:
            rows = None if x is None else as_rows(x)
            problem = saved_problem(problem, rows, weight, lora_A, lora_B, s)
        run = call.backwards[key] = registry.choose(problem, call.backend).run
    return run


# Function.apply without its Python prologue, which unwraps what torch.func left behind: that never
# comes here.
_apply = super(torch.autograd.Function, _LoRALinear).apply


def _registered_run(
    x: Tensor,
    weight: list[Tensor],
    format: str,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    W = operands.build(weight, format)
    check_lora_linear(x, W, lora_A, lora_B, scaling, bias, dropout_p)
    check_dropout(dropout_p, seed)
    rows, dropout, wants = as_rows(x), bool(dropout_p), WANTS["lora_linear"]
    problem = layer_problem(rows, W, lora_A, lora_B, bias, dropout, wants, layouts=True)
    y, s = planned(problem)(rows, W, lora_A, lora_B, scaling, bias, dropout_p, seed)
    return y if x.dim() == 2 else in_shape_of(x, y), s


def _registered_fake(
    x: Tensor,
    weight: list[Tensor],
    format: str,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    W = operands.build(weight, format)
    check_lora_linear(x, W, lora_A, lora_B, scaling, bias, dropout_p)
    check_dropout(dropout_p, seed)
    M = 1
    for size in x.shape[:-1]:
        M = M * size
    y = x.new_empty((*x.shape[:-1], W.shape[0]))
    return y, x.new_empty((M, lora_A.shape[0]), dtype=wide(x.dtype))


def _registered_backward_run(
    dy: Tensor,
    x: Tensor,
    weight: list[Tensor],
    format: str,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    W, rows = operands.build(weight, format), as_rows(x)
    forward = layer_problem(rows, W, lora_A, lora_B, None, bool(dropout_p), (), layouts=True)
    run = planned(backward_problem(forward, FROZEN, as_rows(dy), layouts=True))
    dx, _, dA, dB, _ = run(as_rows(dy), rows, W, lora_A, lora_B, s, scaling, dropout_p, seed)
    return dx.view(*dy.shape[:-1], dx.shape[1]), dA, dB


def _registered_backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: list[Tensor],
    format: str,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = dy.new_empty((*dy.shape[:-1], lora_A.shape[1]))
    return dx, lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)


def _registered_needs(needs: tuple[Any, ...], stored: int) -> tuple[bool, ...]:
    """As the function's, to which the weight is one argument. PyTorch leaves out trailing arguments that
    have their default (no bias, no dropout), and gives a list one by one or as a list."""
    need_dx, *rest = tree_leaves(needs)
    need_dweight, (_, *rest) = any(rest[:stored]), rest[stored:]
    return (need_dx, need_dweight, *rest, False, False, False)[:_ARGUMENTS]


def _registered_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, s = output
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)  # no zeros for that of s
    x, weight, description, *rest = inputs
    needs = _registered_needs(ctx.needs_input_grad, len(weight))
    _save(ctx, (x, operands.build(weight, description), *rest), s, needs)
    ctx.stored = len(weight)


def _registered_backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Any, ...]:
    count = len(ctx.needs_input_grad)
    if dy is None:
        return (None, [None] * ctx.stored, *[None] * (count - 2))
    wants = _wants(_registered_needs(ctx.needs_input_grad, ctx.stored))
    compiling = torch.compiler.is_compiling()
    if torch.is_grad_enabled() or needs_plain_pytorch(compiling) is not None:
        dx, dweight, *rest = _differentiable_backward(ctx, dy, wants)
    else:
        dx, dweight, *rest = _observed_backward(ctx, dy, wants)
    stored = [dweight, *[None] * (ctx.stored - 1)]
    return (dx, stored, None, *rest)[:count]


register(
    "lora_linear",
    "(Tensor x, Tensor[] weight, str format, Tensor lora_A, Tensor lora_B, float scaling, "
    "Tensor? bias=None, float dropout_p=0.0, Tensor? seed=None) -> (Tensor y, Tensor s)",
    _registered_run,
    _registered_fake,
)
register_autograd("lora_linear", _registered_setup_context, _registered_backward)
register(
    "lora_linear_backward",
    "(Tensor dy, Tensor x, Tensor[] weight, str format, Tensor lora_A, Tensor lora_B, Tensor s, "
    "float scaling, float dropout_p=0.0, Tensor? seed=None) -> (Tensor dx, Tensor dA, Tensor dB)",
    _registered_backward_run,
    _registered_backward_fake,
)
