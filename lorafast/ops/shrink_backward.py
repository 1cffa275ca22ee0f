"""``dA = dsᵀ·drop(x)``: contract and registration."""

import torch
from torch import Tensor

from lorafast import reference
from lorafast.ops.checks import check_dropout, check_low_rank, check_matrix
from lorafast.ops.problems import planned, shrink_backward_problem
from lorafast.ops.registration import differentiate_by_reference, register, runner


def _check(
    ds: Tensor, x: Tensor, dropout_p: float, seed: Tensor | None, dtype: torch.dtype | None
) -> None:
    check_matrix("x", x, "M", "K")
    check_matrix("ds", ds, x.shape[0], "r")
    check_low_rank("ds", ds, "x", x.dtype)
    check_dropout(dropout_p, seed)


def _run(
    ds: Tensor,
    x: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    _check(ds, x, dropout_p, seed, dtype)
    problem = shrink_backward_problem(ds, x, dropout_p, seed, dtype or x.dtype)
    dA: Tensor = planned(problem)(ds, x, dropout_p, seed)
    return dA


def _fake(
    ds: Tensor,
    x: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    _check(ds, x, dropout_p, seed, dtype)
    return x.new_empty((ds.shape[1], x.shape[1]), dtype=dtype or x.dtype)


register(
    "shrink_backward",
    "(Tensor ds, Tensor x, float dropout_p=0.0, Tensor? seed=None, ScalarType? dtype=None) -> Tensor",
    _run,
    _fake,
)
differentiate_by_reference("shrink_backward", reference.shrink_backward)
_call = runner("shrink_backward", reference.shrink_backward, _check)


def shrink_backward(
    ds: Tensor,
    x: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``dA = dsᵀ·drop(x)``.

    Shapes: ``ds [M, r]``, ``x [M, K]`` → ``dA [r, K]`` in ``dtype`` (that of ``x`` if None).
    ``ds`` is in the dtype of ``x``, in float32 for float16. ``seed`` is an int64 tensor of one
    element on the device of ``x``.

    Raises:
        ValueError, TypeError: a shape, a dtype, ``dropout_p`` or ``seed`` doesn't fit.
        BackendError: the forced backend can't serve the call.
    """
    dA: Tensor = _call(ds, x, dropout_p, seed, dtype)
    return dA
