"""``ds = scaling · dy·B`` and ``dB = scaling · dyᵀ·s``: contract and registration."""

from torch import Tensor

from lorafast import reference
from lorafast.ops import dispatch
from lorafast.ops.checks import check_low_rank, check_matrix
from lorafast.ops.registration import differentiate_by_reference, register, runner


def _check(dy: Tensor, s: Tensor, lora_B: Tensor, scaling: float) -> None:
    check_matrix("dy", dy, "M", "N")
    check_matrix("s", s, dy.shape[0], "r")
    check_matrix("lora_B", lora_B, dy.shape[1], s.shape[1])
    check_low_rank("s", s, "dy", dy.dtype)


def _run(dy: Tensor, s: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    _check(dy, s, lora_B, scaling)
    run = dispatch.select("expand_backward", dispatch.forced(), dy, s, lora_B)
    ds, dB, *_ = run(dy, s, lora_B, scaling)
    return ds, dB


def _fake(dy: Tensor, s: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    _check(dy, s, lora_B, scaling)
    return s.new_empty(s.shape), lora_B.new_empty(lora_B.shape)


register(
    "expand_backward",
    "(Tensor dy, Tensor s, Tensor lora_B, float scaling) -> (Tensor, Tensor)",
    _run,
    _fake,
)
differentiate_by_reference("expand_backward", reference.expand_backward)
_call = runner("expand_backward", reference.expand_backward, _check)


def expand_backward(dy: Tensor, s: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """``ds = scaling · dy·B`` and ``dB = scaling · dyᵀ·s``, in one pass over ``dy``.

    Shapes: ``dy [M, N]``, ``s [M, r]``, ``lora_B [N, r]`` → ``ds [M, r]`` in the dtype of ``s``
    (that of ``dy``, float32 for float16), ``dB [N, r]`` in the dtype of ``lora_B``.

    Raises:
        ValueError, TypeError: a shape or a dtype doesn't fit.
        BackendError: the forced backend can't serve the call.
    """
    ds, dB = _call(dy, s, lora_B, scaling)
    return ds, dB
