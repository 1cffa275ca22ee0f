"""``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias``: contract and registration."""

from typing import Any

from torch import Tensor

from lorafast import operands, reference
from lorafast.operands import Weight
from lorafast.ops.checks import (
    check_dropout,
    check_frozen,
    check_low_rank,
    check_matrix,
    check_same_dtype,
)
from lorafast.ops.problems import linear_expand_problem, planned
from lorafast.ops.registration import differentiate_by_reference, register, runner


def _check(
    x: Tensor,
    weight: list[Tensor],
    format: str,
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    transposed: bool = False,
) -> Weight:
    W = operands.build(weight, format)
    check_frozen(W)
    check_matrix("x", x, "M", "K")
    if transposed:
        check_matrix("weight", W, x.shape[1], "N")
    else:
        check_matrix("weight", W, "N", x.shape[1])
    N = W.shape[1] if transposed else W.shape[0]
    check_matrix("s", s, x.shape[0], "r")
    check_matrix("lora_B", lora_B, N, s.shape[1])
    check_same_dtype("weight", W, "x", x.dtype)
    check_low_rank("s", s, "x", x.dtype)
    if bias is not None:
        check_same_dtype("bias", bias, "x", x.dtype)
        if bias.dim() != 1 or bias.shape[0] != N:
            raise ValueError(f"bias has shape {list(bias.shape)}, expected [{N}]")
    check_dropout(dropout_p, seed)
    return W


def _run(
    x: Tensor,
    weight: list[Tensor],
    format: str,
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    W = _check(x, weight, format, s, lora_B, scaling, bias, dropout_p, seed, transposed)
    problem = linear_expand_problem(x, W, s, lora_B, bias, dropout_p, seed, transposed)
    y: Tensor = planned(problem)(x, W, s, lora_B, scaling, bias, dropout_p, seed)
    return y


def _fake(
    x: Tensor,
    weight: list[Tensor],
    format: str,
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    W = _check(x, weight, format, s, lora_B, scaling, bias, dropout_p, seed, transposed)
    return x.new_empty((x.shape[0], W.shape[1] if transposed else W.shape[0]))


def _reference(
    x: Tensor,
    weight: list[Tensor],
    format: str,
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    W = operands.build(weight, format)
    dense, x = operands.as_dense(W), x if transposed else operands.activations(x, W)
    return reference.linear_expand(
        x, dense, s, lora_B, scaling, bias, dropout_p, seed, transposed=transposed
    )


register(
    "linear_expand",
    "(Tensor x, Tensor[] weight, str format, Tensor s, Tensor lora_B, float scaling, "
    "Tensor? bias=None, float dropout_p=0.0, Tensor? seed=None, bool transposed=False) -> Tensor",
    _run,
    _fake,
)
differentiate_by_reference("linear_expand", _reference)
_call = runner("linear_expand", _reference, _check)


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
) -> Tensor:
    """``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias``.

    Shapes: ``x [M, K]``, ``weight [N, K]``, ``s [M, r]``, ``lora_B [N, r]``, ``bias [N]`` →
    ``y [M, N]``; all but ``lora_B`` in the dtype of ``x``, but ``s`` in float32 for float16.
    ``transposed``: ``y = x·W + …`` for ``weight [K, N]``: on ``(dy, W, ds, Aᵀ)`` that is ``dx``, where
    the dropout mask falls on the low-rank term. ``weight`` is a tensor or an operand of another format.

    Raises:
        ValueError, TypeError: a shape, a dtype, ``dropout_p`` or ``seed`` doesn't fit.
        BackendError: the forced backend can't serve the call.
    """
    rest: tuple[Any, ...] = (s, lora_B, scaling, bias, dropout_p, seed, transposed)
    y: Tensor = _call(x, operands.stored(weight), operands.describe(weight), *rest)
    return y
