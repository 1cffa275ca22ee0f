"""The native CPU kernels of ``csrc/cpu/``: the skinny products, and layers over a dense W whole.

The base GEMM of another operand is the operand's own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lorafast import operands
from lorafast.backends.cpu import dequantize, native
from lorafast.backends.plan import Run
from lorafast.core.dtypes import wide
from lorafast.core.problem import WANTS, Problem
from lorafast.operands import Weight
from lorafast.reference.dropout import survivor_scale, threshold

_HALF = torch.float16
native.why_not_loaded()  # loads them
_kernels = torch.ops.lorafast_cpu
_shrink = _kernels.shrink.default
_expand_ = _kernels.expand_.default
_expand_backward = _kernels.expand_backward.default
_shrink_backward = _kernels.shrink_backward.default
_linear_expand = _kernels.linear_expand.default
_lora_linear = _kernels.lora_linear.default
_lora_linear_backward = _kernels.lora_linear_backward.default
_lora_linear_on_rows = _kernels.lora_linear_on_rows.default
_lora_linear_backward_on_rows = _kernels.lora_linear_backward_on_rows.default
_lora_linear_ = _kernels.lora_linear_.default
_lora_linear_backward_ = _kernels.lora_linear_backward_.default


def _mask(dropout_p: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    if not dropout_p:
        return None, 0, 1.0
    return seed, threshold(dropout_p), survivor_scale(dropout_p)


def _low_rank(x: Tensor, r: int) -> Tensor:
    """Memory for ``s``; naming a dtype costs a small layer a hundredth of its forward."""
    if x.dtype is _HALF:
        return x.new_empty((x.shape[0], r), dtype=wide(_HALF))
    return x.new_empty((x.shape[0], r))


def shrink(x: Tensor, lora_A: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """``s = drop(x)·Aᵀ``."""
    s = _low_rank(x, lora_A.shape[0])
    _shrink(x, lora_A, *_mask(dropout_p, seed), s)
    return s


def expand(dtype: torch.dtype) -> Run:
    """``y = drop(scaling · s·Bᵀ)`` in ``dtype``."""

    def run(
        s: Tensor, lora_B: Tensor, scaling: float, dropout_p: float, seed: Tensor | None
    ) -> Tensor:
        y = s.new_zeros((s.shape[0], lora_B.shape[0]), dtype=dtype)
        return _add_expanded(y, s, lora_B, scaling, dropout_p, seed)

    return run


def _add_expanded(
    y: Tensor,
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """``y += drop(scaling · s·Bᵀ)``, rounded once."""
    _expand_(y, s, lora_B, float(scaling), *_mask(dropout_p, seed))
    return y


def dense_linear_expand(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """``linear_expand`` of a dense W, the base GEMM in the same call if it isn't a packed copy's."""
    y = operands.finished_linear(x, weight, bias)
    if y is not None:
        return _add_expanded(y, s, lora_B, scaling, dropout_p, seed)
    mask = _mask(dropout_p, seed)
    return _linear_expand(x, weight, False, s, lora_B, float(scaling), bias, *mask)


def dense_linear_expand_transposed(
    dy: Tensor,
    weight: Tensor,
    ds: Tensor,
    lora_A_t: Tensor,
    scaling: float,
    bias: None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """``linear_expand_transposed`` of a dense W, the base GEMM in the same call."""
    mask = _mask(dropout_p, seed)
    return _linear_expand(dy, weight, True, ds, lora_A_t, float(scaling), None, *mask)


def linear_expand(
    x: Tensor,
    weight: Weight,
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias``."""
    return _add_expanded(dequantize.linear(x, weight, bias), s, lora_B, scaling, dropout_p, seed)


def linear_expand_transposed(
    dy: Tensor,
    weight: Weight,
    ds: Tensor,
    lora_A_t: Tensor,
    scaling: float,
    bias: None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """``dx = dy·W + drop(scaling · ds·A)``."""
    dx = dequantize.linear_transposed(dy, weight)
    return _add_expanded(dx, ds, lora_A_t, scaling, dropout_p, seed)


def expand_backward(wants: tuple[str, ...], dtype: torch.dtype) -> Run:
    """``ds = scaling · dy·B``, ``dB = scaling · dyᵀ·s`` in ``dtype``, ``dbias = Σ dy``."""
    want_ds, want_dB, want_dbias = (name in wants for name in WANTS["expand_backward"])

    def run(
        dy: Tensor, s: Tensor | None, lora_B: Tensor | None, scaling: float
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        ds = dB = None
        if want_ds and want_dB:
            assert s is not None
            assert lora_B is not None
            ds, dB = s.new_empty(s.shape), lora_B.new_empty(lora_B.shape)
            _expand_backward(dy, s, lora_B, float(scaling), ds, dB)
        elif want_ds:
            assert lora_B is not None
            ds = _low_rank(dy, lora_B.shape[1])  # a shrink; scaled before it is rounded
            _shrink(dy, lora_B.t().float() * scaling, None, 0, 1.0, ds)
        elif want_dB:
            assert s is not None
            scaled = s.new_empty((s.shape[1], dy.shape[1]), dtype=torch.float32)
            _shrink_backward(s, dy, None, 0, 1.0, scaled)  # transposed
            dB = scaled.t().mul(scaling).to(dtype, memory_format=torch.contiguous_format)
        return ds, dB, dy.sum(0) if want_dbias else None

    return run


def shrink_backward(dtype: torch.dtype) -> Run:
    """``dA = dsᵀ·drop(x)`` in ``dtype``."""

    def run(ds: Tensor, x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
        dA = x.new_empty((ds.shape[1], x.shape[1]), dtype=dtype)
        _shrink_backward(ds, x, *_mask(dropout_p, seed), dA)
        return dA

    return run


def _with_low_rank(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    mask: tuple[Tensor | None, int, float],
) -> tuple[Tensor, Tensor]:
    """``y += scaling · s·Bᵀ`` with ``s = drop(x)·Aᵀ``; both."""
    s = _low_rank(x, lora_A.shape[0])
    _lora_linear_(y, x, lora_A, lora_B, float(scaling), *mask, s)
    return y, s


def _with_low_rank_backward(
    dx: Tensor,
    dy: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``dx += drop'(ds·A)``; ``dA`` and ``dB``."""
    ds, dA, dB = (
        s.new_empty(s.shape),
        lora_A.new_empty(lora_A.shape),
        lora_B.new_empty(lora_B.shape),
    )
    mask = _mask(dropout_p, seed)
    _lora_linear_backward_(dx, dy, x, lora_A, lora_B, s, float(scaling), *mask, ds, dA, dB)
    return dA, dB


def dense_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``lora_linear`` over a dense W, the base GEMM in the same call if it isn't a packed copy's."""
    mask = _mask(dropout_p, seed)
    y = operands.finished_linear(x, weight, bias)
    if y is None:
        return _lora_linear(x, weight, bias, lora_A, lora_B, float(scaling), *mask)
    return _with_low_rank(y, x, lora_A, lora_B, scaling, mask)


def dense_lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, None, Tensor, Tensor, None]:
    """``lora_linear_backward`` over a dense W, the base GEMM in the same call."""
    mask = _mask(dropout_p, seed)
    dx, dA, dB = _lora_linear_backward(dy, x, weight, lora_A, lora_B, s, float(scaling), *mask)
    return dx, None, dA, dB, None


def dense_lora_linear_on_rows(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    first: int,
    end: int,
) -> tuple[Tensor, Tensor]:
    """``dense_lora_linear`` with the adapter on the rows from ``first`` to ``end`` alone."""
    mask = _mask(dropout_p, seed)
    y = operands.finished_linear(x, weight, bias)
    if y is None:
        rows = (first, end)
        return _lora_linear_on_rows(x, weight, bias, lora_A, lora_B, float(scaling), *mask, *rows)
    s = _with_low_rank(y[first:end], x[first:end], lora_A, lora_B, scaling, mask)[1]
    return y, s


def dense_lora_linear_backward_on_rows(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    first: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Its backward; x and s have those rows alone."""
    mask = _mask(dropout_p, seed)
    given = (dy, x, weight, lora_A, lora_B, s)
    return _lora_linear_backward_on_rows(*given, float(scaling), *mask, first)


def lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``shrink`` and ``linear_expand``: ``y`` and ``s``, the skinny products in one call.

    Of few rows without dropout all is one call: the adapter's part joins the sums of the base product.
    """
    coded = None if dropout_p else dequantize.served(weight)
    if coded is not None and dequantize.has_few_rows(x.shape[0], x.dtype, coded):
        return dequantize.layer_of(coded)(
            x, operands.stored(coded), lora_A, lora_B, float(scaling), bias
        )
    y = dequantize.linear(x, weight, bias)
    return _with_low_rank(y, x, lora_A, lora_B, scaling, _mask(dropout_p, seed))


def of_stored(problem: Problem) -> Callable[[Weight], Run | None] | None:
    """What makes ``lora_linear`` over an operand's tensors; None where that is more than one call."""
    if problem.dropout or problem.operation != "lora_linear":
        return None

    def made(weight: Weight) -> Run | None:
        coded = dequantize.served(weight)
        if coded is None or not dequantize.has_few_rows(problem.M, problem.dtype, coded):
            return None
        return dequantize.layer_of(coded)

    return made


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, None, Tensor, Tensor, None]:
    """``expand_backward``, ``shrink_backward`` and ``linear_expand``: ``dx``, ``dA``, ``dB``."""
    dx = dequantize.linear_transposed(dy, weight)
    dA, dB = _with_low_rank_backward(dx, dy, x, lora_A, lora_B, s, scaling, dropout_p, seed)
    return dx, None, dA, dB, None


def lora_linear_on_rows(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    first: int,
    end: int,
) -> tuple[Tensor, Tensor]:
    """``lora_linear`` with the adapter on the rows from ``first`` to ``end`` alone."""
    y, mask = dequantize.linear(x, weight, bias), _mask(dropout_p, seed)
    s = _with_low_rank(y[first:end], x[first:end], lora_A, lora_B, scaling, mask)[1]
    return y, s


def lora_linear_backward_on_rows(
    dy: Tensor,
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    first: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Its backward; x and s have those rows alone."""
    dx, end = dequantize.linear_transposed(dy, weight), first + x.shape[0]
    rest = (lora_A, lora_B, s, scaling, dropout_p, seed)
    dA, dB = _with_low_rank_backward(dx[first:end], dy[first:end], x, *rest)
    return dx, dA, dB


FORWARD: dict[bool, tuple[Run, Run]] = {
    True: (dense_lora_linear, dense_lora_linear_on_rows),
    False: (lora_linear, lora_linear_on_rows),
}
"""By whether W is dense: of all rows, and with the adapter on some of them."""
BACKWARD: dict[bool, tuple[Run, Run]] = {
    True: (dense_lora_linear_backward, dense_lora_linear_backward_on_rows),
    False: (lora_linear_backward, lora_linear_backward_on_rows),
}
