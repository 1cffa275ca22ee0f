"""A call described: of a layer's forward and backward, and of each operation."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lorafast import operands
from lorafast.backends import forced, registry
from lorafast.backends.plan import Backend, Plan, Refusal
from lorafast.core.context import is_batched
from lorafast.core.dtypes import wide
from lorafast.core.errors import BackendError
from lorafast.core.problem import WANTS, WEIGHT_NORM, Layout, Layouts, Problem, is_plain
from lorafast.operands import Weight

FROZEN = ("dx", "dA", "dB")
"""What the backward of a frozen layer with a trained adapter is asked for."""


def as_rows(x: Tensor) -> Tensor:
    """``[..., K]`` as ``[M, K]``."""
    if x.dim() == 2:
        return x
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def gradient_as_rows(dy: Tensor) -> Tensor:
    """The same of a gradient: a batch of is_grads_batched, too, for which flatten has no rule."""
    if dy.dim() == 2 or torch.compiler.is_compiling() or not is_batched(dy):
        return as_rows(dy)
    return dy.reshape(dy.shape[:-1].numel(), dy.shape[-1])


def planned(problem: Problem) -> Any:
    """What runs the problem: by the forced backend, or by the one that is the fastest.

    Raises:
        BackendError: the forced backend can't serve it.
    """
    return registry.choose(problem, forced.forced()).run


def allows_tf32(x: Tensor) -> bool:
    """Whether PyTorch may round the factors of float32 products of ``x`` to TF32, on a CPU to bfloat16.

    On a CPU that is asked when a call is planned: set it before the first."""
    if x.dtype is not torch.float32:
        return False
    mkldnn: Any = torch.backends.mkldnn  # whose attributes are made at run time
    if x.is_cpu and mkldnn.matmul.fp32_precision in ("tf32", "bf16"):
        return True
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _has_addresses(x: Tensor) -> bool:
    """Whether it lies where a backend may read it by address."""
    return x.is_cuda or x.is_cpu


def shrink_problem(x: Tensor, lora_A: Tensor, dropout_p: float, seed: Tensor | None) -> Problem:
    """``s = drop(x)·Aᵀ``."""
    return _problem(
        "shrink", x, lora_A.dtype, K=x.shape[1], r=lora_A.shape[0], others=(seed,),
        layouts={"x": x, "lora_A": lora_A}, dropout=bool(dropout_p),
    )  # fmt: skip


def expand_problem(
    s: Tensor,
    lora_B: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    dtype: torch.dtype,
) -> Problem:
    """``y = drop(scaling · s·Bᵀ)`` in ``dtype``."""
    return _problem(
        "expand", s, lora_B.dtype, N=lora_B.shape[0], r=s.shape[1], others=(seed,),
        layouts={"s": s, "lora_B": lora_B}, dropout=bool(dropout_p), dtype=dtype,
    )  # fmt: skip


def linear_expand_problem(
    x: Tensor,
    weight: Weight,
    s: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    transposed: bool,
) -> Problem:
    """``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias``, or transposed, ``dx``."""
    layouts: dict[str, Tensor | None]
    if transposed:
        layouts = {"dy": x, "s": s, "lora_A": lora_B.t()}  # A as it is stored
    else:
        layouts = {"x": x, "s": s, "lora_B": lora_B}
    N, K = weight.shape
    return _problem(
        "linear_expand", x, lora_B.dtype, K=K, N=N, r=s.shape[1], weight=weight, layouts=layouts,
        others=(seed, bias), transposed=transposed, dropout=bool(dropout_p), bias=bias is not None,
    )  # fmt: skip


def expand_backward_problem(
    dy: Tensor,
    s: Tensor | None,
    lora_B: Tensor | None,
    wants: tuple[str, ...],
    adapter_dtype: torch.dtype,
) -> Problem:
    """``ds``, ``dB`` and ``dbias``, what is wanted of them."""
    factor = lora_B if s is None else s
    return _problem(
        "expand_backward", dy, adapter_dtype, N=dy.shape[1],
        r=0 if factor is None else factor.shape[1],
        layouts={"dy": dy, "s": s, "lora_B": lora_B}, wants=wants,
    )  # fmt: skip


def shrink_backward_problem(
    ds: Tensor,
    x: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    adapter_dtype: torch.dtype,
) -> Problem:
    """``dA = dsᵀ·drop(x)``."""
    return _problem(
        "shrink_backward", x, adapter_dtype, K=x.shape[1], r=ds.shape[1], others=(seed,),
        layouts={"x": x, "s": ds}, dropout=bool(dropout_p),
    )  # fmt: skip


def _problem(
    operation: str,
    x: Tensor,
    adapter_dtype: torch.dtype,
    *,
    K: int = 0,
    N: int = 0,
    r: int,
    weight: Weight | None = None,
    others: tuple[Tensor | None, ...] = (),
    layouts: dict[str, Tensor | None],
    dtype: torch.dtype | None = None,
    **fields: Any,
) -> Problem:
    """The problem of an operation on ``x``, ``dy`` or ``s [M, …]``.

    ``layouts``: by the names of ``Layouts`` the matrices that it reads beside the weight; ``others``:
    what it reads beside these; ``dtype``: that of the problem, if it is not that of ``x``.
    """
    stored = [] if weight is None else operands.stored(weight)
    plain = is_plain(x, *stored, *layouts.values(), *others)
    found = Layouts()
    if plain and _has_addresses(x):
        named = {name: Layout.of(t) for name, t in layouts.items() if t is not None}
        if weight is not None:
            named["weight"] = _weight_layout(weight)
        found = Layouts(**named)
    return Problem(
        operation, x.shape[0], K, N, r, dtype or x.dtype, adapter_dtype, x.device,
        operands.DENSE if weight is None else operands.format_of(weight),
        format_parameters="" if weight is None else operands.parameters_of(weight), plain=plain,
        tf32=dtype in (None, x.dtype) and allows_tf32(x), layouts=found, **fields,
    )  # fmt: skip


def _weight_layout(weight: Weight) -> Layout:
    """How the weight lies in memory; of one that is not dense its format knows."""
    return Layout.of(weight) if isinstance(weight, Tensor) else Layout()


def weight_norm_problem(
    weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor
) -> Problem:
    """``‖W + scaling · B·A‖`` of each row. What reads W doesn't depend on how it lies in memory."""
    (N, K), r = weight.shape, lora_A.shape[0]
    others = (scaling,) if isinstance(scaling, Tensor) else ()
    return Problem(
        WEIGHT_NORM, 0, K, N, r, weight.dtype, torch.promote_types(lora_A.dtype, lora_B.dtype),
        weight.device, operands.format_of(weight),
        plain=is_plain(*operands.stored(weight), lora_A, lora_B, *others),
        format_parameters=operands.parameters_of(weight),
    )  # fmt: skip


def bottleneck_problem(
    h: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    wants: tuple[str, ...],
) -> Problem:
    """A bottleneck adapter's forward; ``h`` and ``residual`` are matrices."""
    return _problem(
        "bottleneck", h, down.dtype, K=h.shape[1], N=up.shape[0], r=down.shape[0],
        layouts={"x": h, "lora_A": down, "lora_B": up, "residual": residual},
        others=(down_bias, up_bias), wants=wants, bias=down_bias is not None,
        activation=activation, residual=residual is not None,
    )  # fmt: skip


def bottleneck_backward_problem(
    dy: Tensor,
    h: Tensor | None,
    a: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    activation: str,
    residual: bool,
    wants: tuple[str, ...],
    adapter_dtype: torch.dtype,
) -> Problem:
    """Its backward; what no wanted result depends on may be None."""
    like = h if h is not None else down
    return _problem(
        "bottleneck_backward", dy, adapter_dtype, K=0 if like is None else like.shape[1],
        N=dy.shape[1], r=0 if a is None else a.shape[1],
        layouts={"x": h, "dy": dy, "lora_A": down, "lora_B": up, "s": a}, wants=wants,
        activation=activation, residual=residual,
    )  # fmt: skip


def scaled_linear_problem(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    scales_input: bool,
    wants: tuple[str, ...],
) -> Problem:
    """A frozen layer with a vector, forward; ``x`` is a matrix."""
    N, K = weight.shape
    return _problem(
        "scaled_linear", x, scale.dtype, K=K, N=N, r=0, weight=weight, layouts={"x": x},
        others=(scale, bias), wants=wants, bias=bias is not None, scales_input=scales_input,
    )  # fmt: skip


def scaled_linear_backward_problem(
    dy: Tensor,
    kept: Tensor | None,
    weight: Tensor | None,
    scale: Tensor,
    scales_input: bool,
    wants: tuple[str, ...],
) -> Problem:
    """Its backward; ``kept`` is z, or x where that is scaled. W is None where no product is needed."""
    K = 0 if weight is None else weight.shape[1]
    return _problem(
        "scaled_linear_backward", dy, scale.dtype, K=K, N=dy.shape[1], r=0, weight=weight,
        layouts={"dy": dy, "x": kept}, others=(scale,), wants=wants, transposed=True,
        scales_input=scales_input,
    )  # fmt: skip


def layer_problem(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    dropout: bool,
    wants: tuple[str, ...],
    layouts: bool,
) -> Problem:
    """A layer's forward, described; ``x`` is a matrix."""
    (N, K), r = weight.shape, lora_A.shape[0]
    plain = is_plain(x, *operands.stored(weight), lora_A, lora_B, bias)
    found = Layouts()
    if layouts and plain and _has_addresses(x):
        found = Layouts(
            x=Layout.of(x),
            weight=_weight_layout(weight),
            lora_A=Layout.of(lora_A),
            lora_B=Layout.of(lora_B),
        )
    return Problem(
        "lora_linear", x.shape[0], K, N, r, x.dtype, lora_A.dtype, x.device,
        operands.format_of(weight), wants=wants, dropout=dropout, bias=bias is not None,
        plain=plain, tf32=allows_tf32(x), layouts=found,
        format_parameters=operands.parameters_of(weight),
    )  # fmt: skip


def backward_problem(p: Problem, wants: tuple[str, ...], dy: Tensor, layouts: bool) -> Problem:
    """The backward of a layer's forward ``p``."""
    plain = p.plain and is_plain(dy)
    found = p.layouts
    if layouts and plain and _has_addresses(dy):
        s = Layout.fresh(p.M, p.r, wide(p.dtype))
        found = found._replace(dy=Layout.of(dy), s=s)
    return p._replace(
        operation="lora_linear_backward", wants=wants, bias=False, plain=plain, layouts=found
    )


def saved_problem(
    p: Problem,
    x: Tensor | None,
    weight: Weight | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    s: Tensor | None,
) -> Problem:
    """The backward ``p``, with the layouts that the tensors saved for it have now."""
    stored = [] if weight is None else operands.stored(weight)
    if not (p.plain and is_plain(x, *stored, lora_A, lora_B, s)):
        return p._replace(plain=False, layouts=Layouts())
    if p.device.type not in ("cpu", "cuda"):
        return p
    named = {"x": x, "lora_A": lora_A, "lora_B": lora_B, "s": s}
    found = {name: Layout.of(tensor) for name, tensor in named.items() if tensor is not None}
    if weight is not None:
        found["weight"] = _weight_layout(weight)
    return p._replace(layouts=p.layouts._replace(**found))


def why_not(name: str, like: Tensor) -> str | None:
    """Why backend ``name`` can't serve layers of the dtype and on the device of ``like``, or None."""
    x = like.new_empty((1, 1))
    problem = layer_problem(x, x, x, x, None, False, ("y",), layouts=True)
    answer = registry.plan_of(name, problem)
    return answer.reason if isinstance(answer, Refusal) else None


def on_backend(name: str | None) -> SimpleNamespace:
    """The operations on backend ``name`` (None: the fastest for each call), as ``by_plans`` has them."""
    return by_plans(lambda problem: registry.choose(problem, name))


def by_backend(backend: Backend) -> SimpleNamespace:
    """The operations as this object plans them, whatever is registered and recorded.

    One that it can't serve raises ``BackendError``.
    """

    @functools.cache
    def choose(problem: Problem) -> Plan:
        plan = backend.plan(problem)
        if isinstance(plan, Refusal):
            raise BackendError(plan.reason)
        return plan

    return by_plans(choose)


def by_plans(choose: Callable[[Problem], Plan]) -> SimpleNamespace:
    """The operations below autograd, each by the plan that ``choose`` has for a call.

    Functions by name, as ``Plan`` describes their arguments, but that ``expand_backward`` returns ``ds``
    and ``dB`` alone, ``shrink_backward`` takes the dtype of ``dA`` too, ``expand`` that of ``y``,
    ``linear_expand`` whether it is ``transposed``, and ``lora_linear_backward`` returns ``dx``, ``dA``
    and ``dB``.
    """

    def run(problem: Problem, *arguments: Any) -> Any:
        return choose(problem).run(*arguments)

    def shrink(
        x: Tensor, lora_A: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None
    ) -> Any:
        problem = shrink_problem(x, lora_A, dropout_p, seed)
        return run(problem, x, lora_A, dropout_p, seed)

    def expand(
        s: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
        *,
        dtype: torch.dtype,
    ) -> Any:
        problem = expand_problem(s, lora_B, dropout_p, seed, dtype)
        return run(problem, s, lora_B, scaling, dropout_p, seed)

    def linear_expand(
        x: Tensor,
        weight: Weight,
        s: Tensor,
        lora_B: Tensor,
        scaling: float,
        bias: Tensor | None = None,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
        *,
        transposed: bool = False,
    ) -> Any:
        problem = linear_expand_problem(x, weight, s, lora_B, bias, dropout_p, seed, transposed)
        return run(problem, x, weight, s, lora_B, scaling, bias, dropout_p, seed)

    def expand_backward(dy: Tensor, s: Tensor, lora_B: Tensor, scaling: float) -> Any:
        problem = expand_backward_problem(dy, s, lora_B, ("ds", "dB"), lora_B.dtype)
        return run(problem, dy, s, lora_B, scaling)[:2]

    def shrink_backward(
        ds: Tensor,
        x: Tensor,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        problem = shrink_backward_problem(ds, x, dropout_p, seed, dtype or x.dtype)
        return run(problem, ds, x, dropout_p, seed)

    def lora_linear(
        x: Tensor,
        weight: Weight,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        bias: Tensor | None = None,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> Any:
        wants = WANTS["lora_linear"]
        problem = layer_problem(
            x, weight, lora_A, lora_B, bias, bool(dropout_p), wants, layouts=True
        )
        return run(problem, x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed)

    def lora_linear_backward(
        dy: Tensor,
        x: Tensor,
        weight: Weight,
        lora_A: Tensor,
        lora_B: Tensor,
        s: Tensor,
        scaling: float,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> Any:
        forward = layer_problem(x, weight, lora_A, lora_B, None, bool(dropout_p), (), layouts=True)
        problem = backward_problem(forward, FROZEN, dy, layouts=True)
        found = run(problem, dy, x, weight, lora_A, lora_B, s, scaling, dropout_p, seed)
        return found[0], found[2], found[3]

    return SimpleNamespace(
        shrink=shrink,
        expand=expand,
        linear_expand=linear_expand,
        expand_backward=expand_backward,
        shrink_backward=shrink_backward,
        lora_linear=lora_linear,
        lora_linear_backward=lora_linear_backward,
    )
