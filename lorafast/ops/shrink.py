"""``s = drop(x)·Aᵀ``: contract and registration."""

from torch import Tensor

from lorafast import reference
from lorafast.core.dtypes import wide
from lorafast.ops.checks import check_dropout, check_matrix
from lorafast.ops.problems import planned, shrink_problem
from lorafast.ops.registration import differentiate_by_reference, register, runner


def _check(x: Tensor, lora_A: Tensor, dropout_p: float, seed: Tensor | None) -> None:
    check_matrix("x", x, "M", "K")
    check_matrix("lora_A", lora_A, "r", x.shape[1])
    check_dropout(dropout_p, seed)


def _run(x: Tensor, lora_A: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    _check(x, lora_A, dropout_p, seed)
    problem = shrink_problem(x, lora_A, dropout_p, seed)
    s: Tensor = planned(problem)(x, lora_A, dropout_p, seed)
    return s


def _fake(x: Tensor, lora_A: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    _check(x, lora_A, dropout_p, seed)
    return x.new_empty((x.shape[0], lora_A.shape[0]), dtype=wide(x.dtype))


register(
    "shrink",
    "(Tensor x, Tensor lora_A, float dropout_p=0.0, Tensor? seed=None) -> Tensor",
    _run,
    _fake,
)
differentiate_by_reference("shrink", reference.shrink)
_call = runner("shrink", reference.shrink, _check)


def shrink(x: Tensor, lora_A: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """``s = drop(x)·Aᵀ``.

    Shapes: ``x [M, K]``, ``lora_A [r, K]`` → ``s [M, r]``, in the dtype of ``x`` (float32 for
    float16, whose range it may leave). ``seed`` is an int64 tensor of one element on the device of
    ``x``.

    Raises:
        ValueError: a shape, ``dropout_p`` or ``seed`` doesn't fit.
        BackendError: the forced backend can't serve the call.
    """
    s: Tensor = _call(x, lora_A, dropout_p, seed)
    return s
