"""LoRA linear layers that share x (q, k and v; gate and up): one pass over x each way for all of them.

    s = x·[A₁; A₂; …]ᵀ                                    one shrink, s = [s₁ | s₂ | …]
    yᵢ = x·Wᵢᵀ + scalingᵢ · sᵢ·Bᵢᵀ + biasᵢ                a linear_expand, when yᵢ is asked for

    dsᵢ = scalingᵢ · dyᵢ·Bᵢ,  dBᵢ = scalingᵢ · dyᵢᵀ·sᵢ    an expand_backward each
    [dA₁; dA₂; …] = [ds₁ | ds₂ | …]ᵀ·x                    one shrink_backward
    dx = Σ dyᵢ·Wᵢ + [ds₁ | ds₂ | …]·[A₁; A₂; …]           one linear_expand, the other GEMMs onto it

Layers are called one by one, so y is made one by one too. The backward is one node: a stand-in for each
y, one element of memory large, brings it the dy of each that was asked for.
"""

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafast import operands
from lorafast.backends import forced, registry
from lorafast.backends.plan import Run
from lorafast.core.context import alone, autocast_enabled, is_batched, without_autocast
from lorafast.core.dtypes import FLOATS
from lorafast.core.problem import PLAIN, Problem
from lorafast.ops.calls import first_call, layouts_matter, where
from lorafast.ops.lora_linear import in_shape_of, layer_backward, unpacked
from lorafast.ops.problems import (
    allows_tf32,
    as_rows,
    expand_backward_problem,
    linear_expand_problem,
    shrink_backward_problem,
    shrink_problem,
)

_KEPT = 4096
_runs: dict[tuple[object, ...], Run] = {}
registry.when_forgotten(_runs.clear)
_top_hooks: Callable[[bool], object] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore: None
)


class Sibling(NamedTuple):
    """A layer's tensors: ``weight [N, K]``, ``lora_A [r, K]``, ``lora_B [N, r]``, ``bias [N]``."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    bias: Tensor | None

    def fits(self, x: Tensor, like: "Sibling") -> bool:
        """Whether it can share ``x [..., K]`` with ``like``, and needs gradients where that does."""
        W, A, B, scaling, bias = self
        if not all(t is None or (_is_plain(t) and t.device == x.device) for t in (W, A, B, bias)):
            return False
        return (
            W.dim() == A.dim() == B.dim() == 2
            and x.shape[-1] == W.shape[1] == A.shape[1]
            and B.shape == (W.shape[0], A.shape[0])
            and A.shape[0] > 0
            and W.dtype is x.dtype
            and W.dtype in FLOATS
            and A.dtype is B.dtype is like.lora_A.dtype
            and A.dtype in FLOATS
            and (bias is None or (bias.shape == W.shape[:1] and bias.dtype is x.dtype))
            and type(scaling) in (float, int)
            and (not torch.is_grad_enabled() or self._needs_as(x, like))
            and (x.device.type not in SHARED_WITH_A_BACKWARD or self._has_backward(x))
        )

    def _has_backward(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or self._is_trained())

    def _needs_as(self, x: Tensor, like: "Sibling") -> bool:
        """Whether its frozen tensors are frozen, and its y requires a gradient where that of ``like``
        does."""
        if self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            return False
        return x.requires_grad or self._is_trained() == like._is_trained()

    def _is_trained(self) -> bool:
        return self.lora_A.requires_grad or self.lora_B.requires_grad

    def version(self) -> tuple[object, ...]:
        """What other values, or other gradients to compute, would have otherwise."""
        tensors = (self.weight, self.lora_A, self.lora_B, self.bias)
        return self.scaling, *[None if t is None else _version(t) for t in tensors]


def _version(t: Tensor) -> tuple[object, ...]:
    """Without what ``t.data`` is told in place: PyTorch doesn't count that."""
    return id(_owner(t)), t._version, t.data_ptr() if _is_plain(t) else None, t.requires_grad


def _is_plain(t: Tensor) -> bool:
    return type(t) in PLAIN and t.layout is torch.strided


def _owner(t: Tensor) -> Tensor:
    """``t``, or what it is a view of: of a weight that is kept transposed each call makes a view."""
    return t if t._base is None else t._base


FEWEST_ROWS, FEWEST_ELEMENTS = 512, 1 << 19
"""Of x, from which sharing it pays: with fewer, putting A's side by side and the longer way through
Python cost more. Measured on a CPU with AVX-512; on GPUs not timed, where only bytes were counted."""

SHARED_WITH_A_BACKWARD = frozenset(("cuda",))
"""Devices on which sharing pays by its backward alone: a layer's forward may be one launch there."""


def can_share(x: Tensor) -> bool:
    """Whether layers may share ``x`` here: in eager code that nothing surrounds, not even an autocast
    that would cast ``x``, and with so many rows that it pays."""
    return (
        not torch.compiler.is_compiling()
        and alone()
        and _is_plain(x)
        and not x.is_inference()  # whose changes PyTorch doesn't count
        and x.dim() > 0
        and x.numel() >= max(FEWEST_ELEMENTS, FEWEST_ROWS * x.shape[-1], 1)
        and (not autocast_enabled(x) or torch.get_autocast_dtype(x.device.type) is x.dtype)
    )


def is_recorded() -> bool:
    """Whether hooks see what is saved for a backward, as checkpointing's do, which computes it again."""
    return _top_hooks(False) is not None


def _surroundings(x: Tensor) -> tuple[object, ...]:
    """What must be the same for another call to share ``x``, beside its version."""
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
    # Checkpointing computes again what was called within it, and no other call.
    hooks = _top_hooks(False) if torch.is_grad_enabled() else None
    return (
        torch.is_grad_enabled(),
        x.requires_grad,
        (x.data_ptr(), x.shape, x.stride()),  # which x.data = other changes without a new version
        threading.get_ident(),
        stream,
        hooks,
        forced.forced(),
    )


class Shared:
    """What siblings share of one ``x``: made when the first is called; each may take its y once.

    It holds ``x`` weakly. Where gradients are needed, a y's node in autograd's graph holds it.
    """

    def __init__(self, x: Tensor, by_key: Mapping[int, Sibling]) -> None:
        self._x = weakref.ref(x)
        self._version = x._version
        self._surroundings = _surroundings(x)
        self.siblings = siblings = tuple(by_key.values())
        self._versions = [one.version() for one in siblings]
        self.keys = tuple(by_key)
        self.left = {key: index for index, key in enumerate(by_key)}
        """Those that haven't taken their y."""
        self._is_over = False
        self.backend = forced.forced()
        self.s: Tensor
        tensors = [getattr(one, name) for name in _TENSORS for one in siblings]
        self.has_graph = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors))
        if self.has_graph:
            self._stand_ins: tuple[Tensor, ...] = _Siblings.apply(self, x, *tensors)
        else:
            with torch.no_grad():
                self.shrink(x)

    def is_of(self, x: Tensor) -> bool:
        """Whether it is the ``x`` that is shared, unchanged, and all around it is as it was."""
        return (
            self._x() is x
            and self._version == x._version
            and self._surroundings == _surroundings(x)
            and not self._is_over
        )

    def was_taken(self, key: int) -> bool:
        """Whether ``key`` has taken its y: when it is called again, another step may have begun."""
        return key in self.keys and key not in self.left

    def has(self, key: int, sibling: Sibling) -> bool:
        """Whether the y of ``key`` can be taken, whose tensors are those of ``sibling`` now."""
        index = self.left.get(key)
        return index is not None and self._versions[index] == sibling.version()

    def end(self) -> None:
        """Nobody takes from it any more: every y was taken, or a backward has run."""
        self._is_over = True
        self._stand_ins = ()
        self.s = self.s.new_empty(0)

    def take(self, key: int, x: Tensor) -> Tensor:
        """``y [..., N]`` of ``key``."""
        index = self.left.pop(key)
        if self.has_graph:
            y: Tensor = _Take.apply(self._stand_ins[index], x.detach(), self, index)
        else:
            with torch.no_grad():
                y = self.y(index, x)
        if not self.left:
            self.end()
        return y

    def shrink(self, x: Tensor) -> Tensor:
        """Makes ``s [M, Σr]``; the A's side by side, ``[Σr, K]``."""
        rows, lora_A = as_rows(x), torch.cat([one.lora_A.detach() for one in self.siblings])
        run = _planned(
            ("shrink",),
            self.backend,
            (rows, lora_A),
            lambda: shrink_problem(rows, lora_A, 0.0, None),
        )
        self.s = run(rows, lora_A, 0.0, None)
        return lora_A

    def y(self, index: int, x: Tensor) -> Tensor:
        """``x·Wᵀ + scaling · s·Bᵀ + bias`` in the shape of ``x``."""
        W, _, B, scaling, bias = self.siblings[index]
        rows, s = as_rows(x), columns(self.s, self.siblings)[index]
        run = _planned(
            ("linear_expand", bias is None), self.backend, (rows, W, s, B),
            lambda: linear_expand_problem(rows, W, s, B, bias, 0.0, None, False),
        )  # fmt: skip
        y: Tensor = run(rows, W, s, B, scaling, bias, 0.0, None)
        return y if x.dim() == 2 else in_shape_of(x, y)


_TENSORS = ("weight", "lora_A", "lora_B")


def columns(s: Tensor, siblings: Sequence[Sibling]) -> tuple[Tensor, ...]:
    """``s [M, Σr]`` or ``dAᵀ`` by siblings: ``[M, r]`` of each."""
    return s.split([one.lora_A.shape[0] for one in siblings], 1)


def _planned(
    what: tuple[object, ...],
    backend: str | None,
    tensors: tuple[Tensor, ...],
    problem: Callable[[], Problem],
) -> Run:
    """The run of an operation on ``tensors``, planned when the first like it came."""
    x = tensors[0]
    key: tuple[object, ...] = (*what, backend, *[(t.shape, t.dtype) for t in tensors], x.device)
    if layouts_matter(x, backend):
        key = (*key, where(tensors), allows_tf32(x))
    run = _runs.get(key)
    if run is None:
        if len(_runs) >= _KEPT:
            _runs.clear()
        run = _runs[key] = registry.choose(problem(), backend).run
    return run


class _Siblings(torch.autograd.Function):
    """``x``, every W, every A, every B → a stand-in for each y, of which the gradient is dy."""

    @staticmethod
    def forward(ctx: Any, shared: Shared, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        siblings, count = shared.siblings, len(shared.siblings)
        lora_A = shared.shrink(x)
        _, need_dx, *rest = ctx.needs_input_grad
        ctx.needs = [
            (need_dx, False, need_dA, need_dB, False, False, False, False)
            for need_dA, need_dB in zip(rest[count : 2 * count], rest[2 * count :], strict=True)
        ]
        ctx.siblings, ctx.backend = siblings, shared.backend
        ctx.shared = weakref.ref(shared)  # which holds this node
        any_dA, any_dB = any(rest[count : 2 * count]), any(rest[2 * count :])
        ctx.save_for_backward(
            x if any_dA else None,
            lora_A if need_dx else None,
            shared.s if any_dB else None,
            *(tensors[: 2 * count] if need_dx else [None] * 2 * count),
            *(tensors[2 * count :] if need_dx or any_dA else [None] * count),
        )
        ctx.set_materialize_grads(False)
        sizes = [(*x.shape[:-1], one.weight.shape[0]) for one in siblings]
        return tuple(x.new_empty_strided(size, (0,) * len(size)) for size in sizes)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        shared = ctx.shared()
        if shared is not None:
            shared.end()
        compiling = torch.compiler.is_compiling()
        some = [dy for dy in dys if dy is not None]
        if (
            not some
            or compiling
            or torch.is_grad_enabled()
            or not alone()
            or any(map(is_batched, some))
        ):
            return None, *_one_by_one(ctx, dys, compiling)
        with without_autocast(some[0]):
            return None, *together(ctx, dys)


_Gradients = tuple[Tensor | None, ...]
"""Of ``x``, every W, every A and every B."""


def together(ctx: Any, dys: Sequence[Tensor | None]) -> _Gradients:
    """The backward of the node ``ctx``, whose ``dys`` were asked for in part or all, by kernels."""
    x, lora_A, given = _given(ctx, dys)
    need_dx, count = ctx.needs[0][0], len(ctx.siblings)
    dAs: list[Tensor | None] = [None] * count
    dBs: list[Tensor | None] = [None] * count
    reduced: dict[int, Tensor] = {}
    for one in given:
        _, _, need_dA, need_dB, *_ = one.needs
        wants = tuple(w for w, need in (("ds", need_dx or need_dA), ("dB", need_dB)) if need)
        if wants:
            ds, dBs[one.place], _ = _expand_backward(ctx, one, wants)
            if ds is not None:
                reduced[one.place] = ds
    trained = [one for one in given if one.needs[2]]
    if trained:
        assert x is not None
        ds = _side_by_side([reduced[one.place] for one in trained])
        for one, dA in zip(trained, _shrink_backward(ctx, trained, ds, as_rows(x)), strict=True):
            dAs[one.place] = dA
    dx = None
    if need_dx:
        assert lora_A is not None
        if len(given) < count:
            lora_A = torch.cat([one.lora_A for one in given if one.lora_A is not None])
        dx = _input_gradient(ctx, given, [reduced[one.place] for one in given], lora_A)
    return dx, *[None] * count, *dAs, *dBs


def _one_by_one(ctx: Any, dys: Sequence[Tensor | None], compiling: bool) -> _Gradients:
    """The same as layers by themselves have it: differentiable, seen by modes, in batches."""
    x, _, given = _given(ctx, dys)
    count = len(ctx.siblings)
    dx: Tensor | None = None
    dAs: list[Tensor | None] = [None] * count
    dBs: list[Tensor | None] = [None] * count
    for one in given:
        part, _, dAs[one.place], dBs[one.place], *_ = _alone(ctx, one, x, compiling)
        if part is not None:
            dx = part if dx is None else dx + part
    return dx, *[None] * count, *dAs, *dBs


class _Given(NamedTuple):
    """A sibling whose dy has come, and what was saved for it."""

    place: int
    dy: Tensor
    weight: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    s: Tensor | None
    sibling: Sibling
    needs: tuple[bool, ...]


def _given(
    ctx: Any, dys: Sequence[Tensor | None]
) -> tuple[Tensor | None, Tensor | None, list[_Given]]:
    """``x``, the A's side by side, and the siblings whose dy has come."""
    x, lora_A, s, *tensors = _unpacked(ctx)
    count = len(ctx.siblings)
    Ws, As, Bs = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
    parts = [None] * count if s is None else columns(s, ctx.siblings)
    given = [
        _Given(i, dy, Ws[i], As[i], Bs[i], parts[i], ctx.siblings[i], ctx.needs[i])
        for i, dy in enumerate(dys)
        if dy is not None
    ]
    return x, lora_A, given


def _unpacked(ctx: Any) -> tuple[Any, ...]:
    """What the siblings saved for their one backward; errors that say so."""
    try:
        return unpacked(ctx)
    except RuntimeError as error:
        if "second time" in str(error):
            raise RuntimeError(
                "siblings (fuse='siblings') have one backward for all of them, and it has run: a "
                "backward through one frees what the others need. Pass retain_graph=True, or add the "
                "losses"
            ) from error
        if "changed in place" in str(error):
            raise RuntimeError(
                f"{error}. The layer has siblings (fuse='siblings'): what it kept is of all of them, of "
                "those that were not called too"
            ) from error
        raise


def _shrink_backward(
    ctx: Any, trained: list[_Given], ds: Tensor, rows: Tensor
) -> tuple[Tensor, ...]:
    """``dA`` of each, in memory of its own: it becomes a parameter's gradient."""
    dtype = trained[0].sibling.lora_A.dtype
    run = _planned(
        ("shrink_backward", dtype), ctx.backend, (ds, rows),
        lambda: shrink_backward_problem(ds, rows, 0.0, None, dtype),
    )  # fmt: skip
    dA: Tensor = run(ds, rows, 0.0, None)
    if len(trained) == 1:
        return (dA,)
    parts = dA.split([one.sibling.lora_A.shape[0] for one in trained])
    return tuple(part.clone() for part in parts)


def _expand_backward(ctx: Any, one: _Given, wants: tuple[str, ...]) -> Any:
    dy, s, lora_B = as_rows(one.dy), one.s, one.lora_B
    dtype = one.sibling.lora_B.dtype
    read = tuple(t for t in (dy, s, lora_B) if t is not None)
    run = _planned(
        ("expand_backward", wants, dtype, s is None), ctx.backend, read,
        lambda: expand_backward_problem(dy, s, lora_B, wants, dtype),
    )  # fmt: skip
    return run(dy, s, lora_B, one.sibling.scaling)


def _input_gradient(ctx: Any, given: list[_Given], reduced: list[Tensor], lora_A: Tensor) -> Tensor:
    """``Σ dy·W + ds·A``: on a forced backend one by one, else all onto one buffer."""
    first, *others = given
    if ctx.backend is not None:
        dx = _product(ctx, first, reduced[0], first.lora_A)
        for one, ds in zip(others, reduced[1:], strict=True):
            dx = dx.add_(_product(ctx, one, ds, one.lora_A))
    else:
        dx = _product(ctx, first, _side_by_side(reduced), lora_A)
        for one in others:
            assert one.weight is not None
            dx = operands.add_linear_transposed_(dx, as_rows(one.dy), one.weight)
    return dx if first.dy.dim() == 2 else dx.view(*first.dy.shape[:-1], dx.shape[1])


def _product(ctx: Any, one: _Given, ds: Tensor, lora_A: Tensor | None) -> Tensor:
    """``dy·W + ds·A``."""
    dy, W = as_rows(one.dy), one.weight
    assert W is not None
    assert lora_A is not None
    lora_A_t = lora_A.t()
    run = _planned(
        ("dx",), ctx.backend, (dy, W, ds, lora_A_t),
        lambda: linear_expand_problem(dy, W, ds, lora_A_t, None, 0.0, None, True),
    )  # fmt: skip
    dx: Tensor = run(dy, W, ds, lora_A_t, 1.0, None, 0.0, None)
    return dx


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _alone(ctx: Any, one: _Given, x: Tensor | None, compiling: bool) -> Any:
    """The gradients of a sibling by the formula of a layer, differentiable, or as modes see it."""
    its = SimpleNamespace(
        saved_tensors=(x, one.lora_A, one.lora_B, one.s, None, *[one.weight][: one.needs[0]]),
        description=operands.DENSE,
        lora_A=one.sibling.lora_A,
        scaling=one.sibling.scaling,
        dropout_p=0.0,
    )
    if not compiling:
        W, A, B, scaling, _ = one.sibling
        like = x if x is not None else one.dy.new_empty((*one.dy.shape[:-1], W.shape[1]))
        its.call = first_call(None, like, W, A, B, scaling, None, 0.0, ctx.backend)
    return layer_backward(its, one.dy, one.needs)


class _Take(torch.autograd.Function):
    """A stand-in, and x → y, whose dy goes to the stand-in."""

    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, x: Tensor, shared: Shared, index: int) -> Tensor:
        ctx.shared = shared
        return shared.y(index, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return dy, None, None, None
