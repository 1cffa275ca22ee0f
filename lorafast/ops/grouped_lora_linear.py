"""The LoRA linear layer of a batch whose elements have adapters of their own.

As ``lora_linear`` has it: in compiled code, and where a mode sees every operation, a call is the op
``lorafast::grouped_lora_linear``; other eager code an ``autograd.Function`` over the same plans; under
``torch.func`` transforms, in forward mode and in exported programs the reference.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lorafast import operands, reference
from lorafast.backends import forced, registry
from lorafast.core.assignment import INTEGERS, Assignment, integers
from lorafast.core.context import (
    alone,
    autocast_enabled,
    is_batched,
    needs_plain_pytorch,
    watched,
    without_autocast,
)
from lorafast.core.dtypes import wide
from lorafast.core.problem import WANTS, Layout, Layouts, Problem, is_plain
from lorafast.operands import Operand, Weight
from lorafast.ops import flops
from lorafast.ops.checks import (
    check_device,
    check_float,
    check_frozen,
    check_no_dtensors,
    check_same_dtype,
    check_shape,
    describe_layout,
    has_rows,
)
from lorafast.ops.problems import allows_tf32, as_rows, planned
from lorafast.ops.registration import register, register_autograd

AdapterOf = Sequence[int] | int | Tensor | Assignment
Gradients = tuple[Any, ...]
"""``dx``, ``dweight``, ``dA``, ``dB``, ``dscaling``, ``dbias``."""

_WANTS = WANTS["grouped_lora_linear_backward"]


def grouped_lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    adapter_of: AdapterOf,
    bias: Tensor | None = None,
) -> Tensor:
    """``y_i = x_i·Wᵀ + scaling[g_i] · (x_i·A[g_i]ᵀ)·B[g_i]ᵀ + bias`` outside autocast; as
    ``functional.grouped_lora_linear``."""
    y: Tensor
    compiling = torch.compiler.is_compiling()
    check_no_dtensors(
        "grouped_lora_linear", x=x, weight=weight, lora_A=lora_A, lora_B=lora_B, scaling=scaling,
        adapter_of=adapter_of, bias=bias,
    )  # fmt: skip
    _check(x, weight, lora_A, lora_B, scaling, bias)
    scaling = _each_scaling(scaling, x, lora_A)
    known = _check_adapter_of(adapter_of, x, lora_A.shape[0])
    reason = needs_plain_pytorch(compiling)
    if reason is not None:
        forced.check_plain_pytorch("grouped_lora_linear", reason)
        found = known.adapter_of if isinstance(known, Assignment) else known
        dense, elements = operands.as_dense(weight), reference.as_elements(x, found)
        y = reference.grouped_lora_linear(
            elements, dense, lora_A, lora_B, scaling, found, bias, operands.activations(x, weight)
        )
        return y.reshape(*x.shape[:-1], dense.shape[0])
    if compiling or watched():
        if not compiling:
            flops.tell_counters()
        tensor = _as_tensor(known, x)
        y = torch.ops.lorafast.grouped_lora_linear(
            x, operands.stored(weight), operands.describe(weight), lora_A, lora_B, scaling, tensor,
            bias,
        )[0]  # fmt: skip
        return y
    assignment = known if isinstance(known, Assignment) else Assignment(known)
    assignment.made(_check_range, lora_A.shape[0])
    arguments = (x, weight, lora_A, lora_B, scaling, bias)
    backend = forced.forced()
    if torch.is_grad_enabled():
        y = _GroupedLoRALinear.apply(backend, assignment, *arguments)
    else:
        y, _, _ = _forward(backend, assignment, *arguments, wants=("y",))
    return y


def _check(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    bias: Tensor | None,
) -> None:
    """Raises ``TypeError`` or ``ValueError`` if the arguments don't make a layer of several adapters."""
    tensors: dict[str, Weight] = {"x": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B}
    if bias is not None:
        tensors["bias"] = bias
    if isinstance(scaling, Tensor):
        tensors["scaling"] = scaling
    elif isinstance(scaling, bool) or not isinstance(scaling, (int, float, torch.SymFloat)):
        raise TypeError(
            f"scaling is a {type(scaling).__name__}, expected a number or a tensor [n], one for each "
            "adapter"
        )
    for name, tensor in tensors.items():
        check_float(name, tensor, (Tensor, Operand) if name == "weight" else Tensor)
    if not has_rows(x):
        raise TypeError(f"x is {describe_layout(x)}, expected a strided tensor")
    check_shape("weight", weight, "out_features", "in_features")
    N, K = weight.shape
    check_shape("lora_A", lora_A, "n", "r", K)
    n, r, _ = lora_A.shape
    if n == 0 or r == 0:
        missing = "there is no adapter" if n == 0 else "the rank r is 0"
        raise ValueError(f"lora_A has shape {list(lora_A.shape)}: {missing}, expected at least 1")
    check_shape("lora_B", lora_B, n, N, r)
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(
            f"x has shape {list(x.shape)}, expected [..., {K}]: weight has {K} input features"
        )
    if isinstance(scaling, Tensor) and scaling.dim() > 0 and scaling.shape != (n,):
        raise ValueError(f"scaling has shape {list(scaling.shape)}, expected [{n}] or a number")
    if bias is not None:
        check_shape("bias", bias, N)
    check_same_dtype("weight", weight, "x", x.dtype)
    check_same_dtype("lora_B", lora_B, "lora_A", lora_A.dtype)
    if bias is not None:
        check_same_dtype("bias", bias, "x", x.dtype)
    for name, tensor in tensors.items():
        check_device(name, tensor, x.device, "x")
    check_frozen(weight)


def _each_scaling(scaling: float | Tensor, x: Tensor, lora_A: Tensor) -> Tensor:
    """``[n]``, without asking for the value of a tensor."""
    n = lora_A.shape[0]
    if isinstance(scaling, Tensor):
        return scaling if scaling.dim() else scaling.expand(n)
    double = torch.float64 in (x.dtype, lora_A.dtype)
    dtype = torch.float64 if double else torch.float32
    return torch.full((n,), scaling, dtype=dtype, device=x.device)


def _as_tensor(known: list[int] | Tensor | Assignment, x: Tensor) -> Tensor:
    """``adapter_of`` in the shape that it was given in, as the registered operation takes it."""
    if isinstance(known, Assignment):
        known = known.adapter_of
    tensor = known if isinstance(known, Tensor) else torch.tensor(known, dtype=torch.int64)
    leading = x.shape[:-1]
    return tensor.view(leading) if tensor.shape[0] == leading.numel() else tensor


def _check_adapter_of(adapter_of: AdapterOf, x: Tensor, n: int) -> list[int] | Tensor | Assignment:
    """The indices of ``E`` elements: a list, which was checked, a tensor ``[E]`` or an assignment, whose
    values were not looked at."""
    leading = x.shape[:-1]
    if isinstance(adapter_of, Assignment):
        if adapter_of.elements not in (leading.numel(), *leading[:1]):
            raise ValueError(
                f"adapter_of is of {adapter_of.elements} elements, and x has shape {list(x.shape)}"
            )
        if isinstance(adapter_of.adapter_of, Tensor):
            _check_place(adapter_of.adapter_of, x)
        else:
            adapter_of.made(_check_range, n)
        return adapter_of
    if isinstance(adapter_of, Tensor):
        if not has_rows(adapter_of):
            raise TypeError(
                f"adapter_of is {describe_layout(adapter_of)}, expected a strided tensor"
            )
        if adapter_of.dtype not in INTEGERS:
            raise TypeError(f"adapter_of is {adapter_of.dtype}, expected integers")
        if adapter_of.shape != leading and (not leading or adapter_of.shape != leading[:1]):
            first = f" or [{leading[0]}]" if len(leading) > 1 else ""
            raise ValueError(
                f"adapter_of has shape {list(adapter_of.shape)}, expected {list(leading)}{first}: x has "
                f"shape {list(x.shape)}"
            )
        _check_place(adapter_of, x)
        return adapter_of.reshape(-1)
    if isinstance(adapter_of, int) and not leading:
        adapter_of = (adapter_of,)
    found = integers(adapter_of)
    _check_indices(found, n)
    expected = leading[0] if leading else 1
    if len(found) != expected:
        raise ValueError(
            f"adapter_of has {len(found)} indices, expected {expected}: x has shape {list(x.shape)}"
        )
    return found


def _check_place(adapter_of: Tensor, x: Tensor) -> None:
    if adapter_of.device != x.device and adapter_of.device.type != "cpu":
        raise ValueError(
            f"adapter_of is on {adapter_of.device}, expected {x.device}, where x is, or the CPU"
        )


def _check_indices(adapter_of: list[int], n: int) -> None:
    for i, g in enumerate(adapter_of):
        if not -1 <= g < n:
            raise ValueError(
                f"adapter_of holds {g} at {i}, expected -1 (none) to {n - 1}: lora_A has {n} adapters"
            )


def _check_range(assignment: Assignment, n: int) -> None:
    """Of what the host knows at once; a GPU asserts it when it gets there."""
    adapter_of = assignment.adapter_of
    if not isinstance(adapter_of, Tensor):
        _check_indices(adapter_of, n)
    elif adapter_of.is_cuda:
        fits = ((adapter_of >= -1) & (adapter_of < n)).all()
        torch._assert_async(fits, f"adapter_of holds an index that is not from -1 to {n - 1}")


def _problem(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    bias: Tensor | None,
    wants: tuple[str, ...],
) -> Problem:
    """The forward, described; ``x`` is a matrix."""
    (N, K), (n, r, _) = weight.shape, lora_A.shape
    plain = is_plain(x, *operands.stored(weight), lora_A, lora_B, scaling, bias)
    layouts = Layouts()
    if plain and x.is_cuda:
        layouts = Layouts(x=Layout.of(x), lora_A=Layout.of(lora_A), lora_B=Layout.of(lora_B))
        if isinstance(weight, Tensor):
            layouts = layouts._replace(weight=Layout.of(weight))
    return Problem(
        "grouped_lora_linear", x.shape[0], K, N, r, x.dtype, lora_A.dtype, x.device,
        operands.format_of(weight), wants=wants, bias=bias is not None, plain=plain,
        tf32=allows_tf32(x), layouts=layouts, format_parameters=operands.parameters_of(weight),
        adapters=n,
    )  # fmt: skip


def _backward_problem(p: Problem, wants: tuple[str, ...], saved: "_Saved", dy: Tensor) -> Problem:
    """The backward of ``p``, on the tensors as they were saved."""
    x, weight, lora_A, lora_B, s, _ = saved
    stored = [] if weight is None else operands.stored(weight)
    plain = p.plain and is_plain(dy, x, *stored, lora_A, lora_B, s)
    layouts = Layouts()
    if plain and dy.is_cuda:
        named = {"dy": dy, "x": x, "lora_A": lora_A, "lora_B": lora_B, "s": s}
        if isinstance(weight, Tensor):
            named["weight"] = weight
        layouts = Layouts(**{k: Layout.of(t) for k, t in named.items() if t is not None})
    return p._replace(
        operation="grouped_lora_linear_backward", wants=wants, bias=False, plain=plain,
        layouts=layouts,
    )  # fmt: skip


def _forward(
    backend: str | None,
    assignment: Assignment,
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    bias: Tensor | None,
    *,
    wants: tuple[str, ...],
) -> tuple[Tensor, Tensor | None, Problem]:
    """``y`` in the shape of ``x``, ``s [M, r]`` if it is wanted, and the call as it was described."""
    rows = as_rows(x)
    problem = _problem(rows, weight, lora_A, lora_B, scaling, bias, wants)
    run = registry.choose(problem, backend).run
    y, s = run(rows, weight, lora_A, lora_B, scaling, assignment, bias)
    # Not a view: autograd forbids to change in place what a Function returns as one.
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1])), s, problem


class _Saved(NamedTuple):
    """What was kept for the backward: matrices, None where nothing wanted takes them."""

    x: Tensor | None
    weight: Weight | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    s: Tensor | None
    scaling: Tensor


def _save(
    ctx: Any,
    inputs: tuple[Any, ...],
    adapter_of: Tensor | None,
    s: Tensor | None,
    needs: tuple[bool, ...],
) -> None:
    """Keeps for the backward what the needed gradients take, so that all else may change meanwhile."""
    x, weight, lora_A, lora_B, scaling, _ = inputs
    need_dx, need_dweight, need_dA, need_dB, need_dscaling, _ = needs
    ctx.description = operands.describe(weight)
    ctx.save_for_backward(
        x if need_dA or need_dweight else None,
        lora_A if need_dx else None,
        lora_B if need_dx or need_dA or need_dscaling else None,
        s if need_dB or need_dscaling else None,
        scaling,
        adapter_of,
        *(operands.stored(weight) if need_dx else ()),
    )
    ctx.lora_A = lora_A  # not its values: what a second derivative is for


def _saved(ctx: Any) -> tuple[_Saved, Tensor | None]:
    """What ``_save`` kept, and ``adapter_of``; to be asked once in a backward."""
    try:
        x, lora_A, lora_B, s, scaling, adapter_of, *stored = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise RuntimeError(
            "x, weight, lora_A, lora_B, scaling or adapter_of was changed in place after a LoRA layer "
            "had kept it for its backward: write x = x + layer(x), not x += layer(x), and step the "
            "optimizer only after the backward"
        ) from error
    weight = operands.build(stored, ctx.description) if stored else None
    rows = None if x is None else as_rows(x)
    return _Saved(rows, weight, lora_A, lora_B, s, scaling), adapter_of


def _wants(needs: tuple[bool, ...]) -> tuple[str, ...]:
    return tuple(name for name, need in zip(_WANTS, needs, strict=True) if need)


def _in_shape_of(dy: Tensor, found: Gradients) -> Gradients:
    """``dx`` with the leading dimensions of ``dy``."""
    dx, *rest = found
    return (None if dx is None else dx.view(*dy.shape[:-1], dx.shape[1]), *rest)


def _differentiable_backward(
    ctx: Any, dy: Tensor, wants: tuple[str, ...], saved: _Saved, assignment: Assignment
) -> Gradients:
    """The formula on the reference operations, so that PyTorch can differentiate it once more."""
    if saved.s is not None:
        if saved.x is not None:
            # s was saved as a number; its dependence on x and A must be part of the graph.
            again = reference.grouped_shrink(saved.x, ctx.lora_A, assignment.adapter_of)
            saved = saved._replace(s=again + (saved.s - again).detach())
        elif "dx" in wants:
            raise RuntimeError(
                "a second derivative of grouped_lora_linear needs x, which is not kept when lora_A has "
                "no gradient: let lora_A require one"
            )
    return _defined_backward(ctx, dy, wants, saved, assignment)


def _defined_backward(
    ctx: Any, dy: Tensor, wants: tuple[str, ...], saved: _Saved, assignment: Assignment
) -> Gradients:
    """The formula on the reference operations."""
    dtype, device = (
        ctx.lora_A.dtype,
        torch.device("cpu"),
    )  # the reference asks for none, nor for sizes
    problem = Problem("grouped_lora_linear_backward", 0, 0, 0, 0, dtype, dtype, device, wants=wants)
    run = registry.definition(problem).run
    rows = dy.reshape(
        dy.shape[:-1].numel(), dy.shape[-1]
    )  # which is_grads_batched has, not flatten
    return _in_shape_of(dy, run(rows, *saved, assignment))


def _observed_backward(
    ctx: Any, dy: Tensor, wants: tuple[str, ...], saved: _Saved, adapter_of: Tensor
) -> Gradients:
    """By the registered operation, as compiled code and modes have it."""
    x, weight, *rest = saved
    found = torch.ops.lorafast.grouped_lora_linear_backward(
        as_rows(dy), x, [] if weight is None else operands.stored(weight), ctx.description, *rest,
        adapter_of, ",".join(wants), ctx.lora_A.dtype,
    )  # fmt: skip
    asked = zip(_WANTS, found, strict=True)
    return _in_shape_of(dy, tuple(tensor if name in wants else None for name, tensor in asked))


class _GroupedLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str | None, assignment: Assignment, *inputs: Any) -> Tensor:
        needs = ctx.needs_input_grad[2:]
        *_, need_dB, need_dscaling, _ = needs
        wants = ("y", "s") if need_dB or need_dscaling else ("y",)
        y, s, ctx.problem = _forward(backend, assignment, *inputs, wants=wants)
        ctx.backend, ctx.assignment = backend, assignment
        adapter_of = assignment.adapter_of
        _save(ctx, inputs, adapter_of if isinstance(adapter_of, Tensor) else None, s, needs)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        wants = _wants(ctx.needs_input_grad[2:])
        if torch.compiler.is_compiling():  # compiled autograd, which traces this
            adapter_of = ctx.assignment.tensor()
            return None, None, *_observed_backward(ctx, dy, wants, _saved(ctx)[0], adapter_of)
        if autocast_enabled(dy):
            with without_autocast(dy):
                return None, None, *_eager_backward(ctx, dy, wants)
        return None, None, *_eager_backward(ctx, dy, wants)


def _eager_backward(ctx: Any, dy: Tensor, wants: tuple[str, ...]) -> Gradients:
    assignment: Assignment = ctx.assignment
    saved, _ = _saved(ctx)
    if torch.is_grad_enabled():
        return _differentiable_backward(ctx, dy, wants, saved, assignment)
    plain = is_batched(dy)  # is_grads_batched, which no kernel knows
    if not plain and not alone():
        with forced.use_backend(ctx.backend or registry.AUTO):
            # Of what began after the forward: its tangents, its batches.
            reason = needs_plain_pytorch()
            if reason is not None:
                forced.check_plain_pytorch("grouped_lora_linear_backward", reason)
                plain = True
            elif watched():
                flops.tell_counters()
                return _observed_backward(ctx, dy, wants, saved, assignment.tensor())
    if plain:
        return _defined_backward(ctx, dy, wants, saved, assignment)
    problem = _backward_problem(ctx.problem, wants, saved, as_rows(dy))
    run = registry.choose(problem, ctx.backend).run
    return _in_shape_of(dy, run(as_rows(dy), *saved, assignment))


def _registered_run(
    x: Tensor,
    weight: list[Tensor],
    format: str,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    adapter_of: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    W = operands.build(weight, format)
    _check_registered(x, W, lora_A, lora_B, scaling, adapter_of, bias)
    assignment = Assignment(adapter_of)
    _check_range(assignment, lora_A.shape[0])
    arguments = (x, W, lora_A, lora_B, scaling, bias)
    wants = WANTS["grouped_lora_linear"]
    y, s, _ = _forward(forced.forced(), assignment, *arguments, wants=wants)
    assert s is not None
    return y, s


def _registered_fake(
    x: Tensor,
    weight: list[Tensor],
    format: str,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    adapter_of: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    W = operands.build(weight, format)
    _check_registered(x, W, lora_A, lora_B, scaling, adapter_of, bias)
    M = 1
    for size in x.shape[:-1]:
        M = M * size
    y = x.new_empty((*x.shape[:-1], W.shape[0]))
    return y, x.new_empty((M, lora_A.shape[1]), dtype=wide(x.dtype))


def _check_registered(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    adapter_of: Tensor,
    bias: Tensor | None,
) -> None:
    _check(x, weight, lora_A, lora_B, scaling, bias)
    _check_adapter_of(adapter_of, x, lora_A.shape[0])


def _registered_backward_run(
    dy: Tensor,
    x: Tensor | None,
    weight: list[Tensor],
    format: str,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    s: Tensor | None,
    scaling: Tensor,
    adapter_of: Tensor,
    wants: str,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    asked = tuple(wants.split(","))
    W = operands.build(weight, format) if weight else None
    saved = _Saved(x, W, lora_A, lora_B, s, scaling)
    n, r, K = _sizes(x, lora_A, lora_B, s, scaling)
    forward = Problem(
        "grouped_lora_linear", dy.shape[0], K, dy.shape[1], r, dy.dtype, dtype, dy.device,
        operands.DENSE if W is None else operands.format_of(W), tf32=allows_tf32(dy),
        format_parameters="" if W is None else operands.parameters_of(W), adapters=n,
    )  # fmt: skip
    run = planned(_backward_problem(forward, asked, saved, dy))
    found = run(dy, *saved, Assignment(adapter_of))
    return tuple(dy.new_empty(0) if tensor is None else tensor for tensor in found)


def _registered_backward_fake(
    dy: Tensor,
    x: Tensor | None,
    weight: list[Tensor],
    format: str,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    s: Tensor | None,
    scaling: Tensor,
    adapter_of: Tensor,
    wants: str,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    asked, N = wants.split(","), dy.shape[1]
    n, r, K = _sizes(x, lora_A, lora_B, s, scaling)
    shapes: dict[str, tuple[Any, torch.dtype]] = {
        "dx": ((dy.shape[0], K), dy.dtype),
        "dweight": ((N, K), dy.dtype),
        "dA": ((n, r, K), dtype),
        "dB": ((n, N, r), dtype),
        "dscaling": ((n,), scaling.dtype),
        "dbias": ((N,), dy.dtype),
    }
    return tuple(
        dy.new_empty(shape, dtype=of) if name in asked else dy.new_empty(0)
        for name, (shape, of) in shapes.items()
    )


def _sizes(
    x: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    s: Tensor | None,
    scaling: Tensor,
) -> tuple[int, int, int]:
    """``n``, ``r`` and ``K``, 0 where nothing wanted depends on it."""
    r = K = 0
    if s is not None:
        r = s.shape[1]
    if lora_B is not None:
        r = lora_B.shape[2]
    if lora_A is not None:
        K = lora_A.shape[2]
    if x is not None:
        K = x.shape[1]
    return scaling.shape[0], r, K


def _registered_needs(needs: tuple[Any, ...], stored: int) -> tuple[bool, ...]:
    """As the function's. PyTorch leaves out a bias that is None, and gives a list one by one or as a
    list."""
    need_dx, *rest = tree_leaves(needs)
    need_dweight, (_, need_dA, need_dB, need_dscaling, _, *need_dbias) = (
        any(rest[:stored]), rest[stored:],
    )  # fmt: skip
    return need_dx, need_dweight, need_dA, need_dB, need_dscaling, any(need_dbias)


def _registered_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, s = output
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)  # no zeros for that of s
    x, weight, description, lora_A, lora_B, scaling, adapter_of, *bias = inputs
    needs = _registered_needs(ctx.needs_input_grad, len(weight))
    W = operands.build(weight, description)
    arguments = (x, W, lora_A, lora_B, scaling, bias[0] if bias else None)
    _save(ctx, arguments, adapter_of, s, needs)
    ctx.stored = len(weight)


def _registered_backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Any, ...]:
    count = len(ctx.needs_input_grad)
    if dy is None:
        return (None, [None] * ctx.stored, *[None] * (count - 2))
    wants = _wants(_registered_needs(ctx.needs_input_grad, ctx.stored))
    saved, adapter_of = _saved(ctx)
    assert adapter_of is not None
    if torch.is_grad_enabled():
        found = _differentiable_backward(ctx, dy, wants, saved, Assignment(adapter_of))
    elif needs_plain_pytorch(torch.compiler.is_compiling()) is not None:
        found = _defined_backward(ctx, dy, wants, saved, Assignment(adapter_of))
    else:
        found = _observed_backward(ctx, dy, wants, saved, adapter_of)
    dx, dweight, dA, dB, dscaling, dbias = found
    stored = [dweight, *[None] * (ctx.stored - 1)]
    return (dx, stored, None, dA, dB, dscaling, None, dbias)[:count]


register(
    "grouped_lora_linear",
    "(Tensor x, Tensor[] weight, str format, Tensor lora_A, Tensor lora_B, Tensor scaling, "
    "Tensor adapter_of, Tensor? bias=None) -> (Tensor y, Tensor s)",
    _registered_run,
    _registered_fake,
)
register_autograd("grouped_lora_linear", _registered_setup_context, _registered_backward)
register(
    "grouped_lora_linear_backward",
    "(Tensor dy, Tensor? x, Tensor[] weight, str format, Tensor? lora_A, Tensor? lora_B, Tensor? s, "
    "Tensor scaling, Tensor adapter_of, str wants, ScalarType dtype) "
    "-> (Tensor dx, Tensor dweight, Tensor dA, Tensor dB, Tensor dscaling, Tensor dbias)",
    _registered_backward_run,
    _registered_backward_fake,
)
