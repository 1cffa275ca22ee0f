"""``y = drop(scaling · s·Bᵀ)``: contract and registration."""

import torch
from torch import Tensor

from lorafast import reference
from lorafast.ops.checks import check_dropout, check_low_rank, check_matrix
from lorafast.ops.problems import expand_problem, planned
from lorafast.ops.registration import differentiate_by_reference, register, runner


def _check(
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.dtype:
    """The dtype of ``y``."""
    check_matrix("s", s, "M", "r")
    check_matrix("lora_B", lora_B, "N", s.shape[1])
    dtype = dtype or s.dtype
    check_low_rank("s", s, "y", dtype)
    check_dropout(dropout_p, seed)
    return dtype


def _run(
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    dtype = _check(s, lora_B, scaling, dropout_p, seed, dtype)
    problem = expand_problem(s, lora_B, dropout_p, seed, dtype)
    y: Tensor = planned(problem)(s, lora_B, scaling, dropout_p, seed)
    return y


def _fake(
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    dtype = _check(s, lora_B, scaling, dropout_p, seed, dtype)
    return s.new_empty((s.shape[0], lora_B.shape[0]), dtype=dtype)


def _reference(
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return reference.expand(s, lora_B, scaling, dropout_p, seed, dtype=dtype or s.dtype)


register(
    "expand",
    "(Tensor s, Tensor lora_B, float scaling, float dropout_p=0.0, Tensor? seed=None, "
    "ScalarType? dtype=None) -> Tensor",
    _run,
    _fake,
)
differentiate_by_reference("expand", _reference)
_call = runner("expand", _reference, _check)


def expand(
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """``y = drop(scaling · s·Bᵀ)``.

    Shapes: ``s [M, r]``, ``lora_B [N, r]`` → ``y [M, N]`` in ``dtype``; ``s`` in ``dtype``, in float32
    for float16. The mask is that of ``y``. ``seed`` is an int64 tensor of one element on the device of
    ``s``.

    Raises:
        ValueError, TypeError: a shape, a dtype, ``dropout_p`` or ``seed`` doesn't fit.
        BackendError: the forced backend can't serve the call.
    """
    y: Tensor = _call(s, lora_B, scaling, dropout_p, seed, dtype)
    return y
