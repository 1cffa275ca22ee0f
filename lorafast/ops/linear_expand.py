"""``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias``: contract and registration."""

from torch import Tensor

from lorafast import reference
from lorafast.ops import dispatch
from lorafast.ops.checks import check_dropout, check_low_rank, check_matrix, check_same_dtype
from lorafast.ops.registration import differentiate_by_reference, register, runner


def _check(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    check_matrix("x", x, "M", "K")
    check_matrix("weight", weight, "N", x.shape[1])
    check_matrix("s", s, x.shape[0], "r")
    check_matrix("lora_B", lora_B, weight.shape[0], s.shape[1])
    check_same_dtype("weight", weight, "x", x.dtype)
    check_low_rank("s", s, "x", x.dtype)
    if bias is not None:
        check_same_dtype("bias", bias, "x", x.dtype)
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias has shape {list(bias.shape)}, expected [{weight.shape[0]}]")
    check_dropout(dropout_p, seed)


def _run(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    _check(x, weight, s, lora_B, scaling, bias, dropout_p, seed)
    run = dispatch.select("linear_expand", dispatch.forced(), x, weight, s, lora_B, bias, seed)
    y: Tensor = run(x, weight, s, lora_B, scaling, bias, dropout_p, seed)
    return y


def _fake(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    _check(x, weight, s, lora_B, scaling, bias, dropout_p, seed)
    return x.new_empty((x.shape[0], weight.shape[0]))


register(
    "linear_expand",
    "(Tensor x, Tensor weight, Tensor s, Tensor lora_B, float scaling, Tensor? bias=None, "
    "float dropout_p=0.0, Tensor? seed=None) -> Tensor",
    _run,
    _fake,
)
differentiate_by_reference("linear_expand", reference.linear_expand)
_call = runner("linear_expand", reference.linear_expand, _check)


def linear_expand(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias``.

    Shapes: ``x [M, K]``, ``weight [N, K]``, ``s [M, r]``, ``lora_B [N, r]``, ``bias [N]`` →
    ``y [M, N]``; all but ``lora_B`` in the dtype of ``x``, but ``s`` in float32 for float16. On
    ``(dy, Wᵀ, ds, Aᵀ)`` it is ``dx``, where the dropout mask falls on the low-rank term.

    Raises:
        ValueError, TypeError: a shape, a dtype, ``dropout_p`` or ``seed`` doesn't fit.
        BackendError: the forced backend can't serve the call.
    """
    y: Tensor = _call(x, weight, s, lora_B, scaling, bias, dropout_p, seed)
    return y
