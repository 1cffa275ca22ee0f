"""``ds = scaling · dy·B`` and ``dB = scaling · dyᵀ·s``: contract and registration."""

import torch
from torch import Tensor

from lorafast import reference
from lorafast.core.dtypes import wide
from lorafast.core.problem import WANTS
from lorafast.ops.checks import check_low_rank, check_matrix, check_same_dtype
from lorafast.ops.problems import expand_backward_problem, planned
from lorafast.ops.registration import differentiate_by_reference, register, runner

_BOTH = "ds,dB"
_Triple = tuple[Tensor, Tensor, Tensor]


def _check(
    dy: Tensor,
    s: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    wants: str = _BOTH,
    dtype: torch.dtype | None = None,
) -> tuple[str, ...]:
    """What is wanted; ``s`` and ``lora_B`` may be None where nothing wanted needs them."""
    check_matrix("dy", dy, "M", "N")
    names, asked = WANTS["expand_backward"], tuple(wants.split(","))
    if asked != tuple(name for name in names if name in asked):
        raise ValueError(f"wants is {wants!r}, expected some of {','.join(names)} in this order")
    for name, tensor, result in (("s", s, "dB"), ("lora_B", lora_B, "ds")):
        if tensor is None and result in asked:
            raise ValueError(f"{name} is None, expected a matrix: {result} is wanted")
    r: object = "r"
    if s is not None:
        check_matrix("s", s, dy.shape[0], "r")
        check_low_rank("s", s, "dy", dy.dtype)
        r = s.shape[1]
    if lora_B is not None:
        check_matrix("lora_B", lora_B, dy.shape[1], r)
        check_same_dtype("lora_B", lora_B, "dB", dtype or lora_B.dtype)
    return asked


def _run(
    dy: Tensor,
    s: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    wants: str = _BOTH,
    dtype: torch.dtype | None = None,
) -> _Triple:
    asked = _check(dy, s, lora_B, scaling, wants, dtype)
    problem = expand_backward_problem(dy, s, lora_B, asked, _dtype_of_dB(dy, lora_B, dtype))
    found = planned(problem)(dy, s, lora_B, scaling)
    ds, dB, dbias = (dy.new_empty(0) if tensor is None else tensor for tensor in found)
    return ds, dB, dbias


def _fake(
    dy: Tensor,
    s: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    wants: str = _BOTH,
    dtype: torch.dtype | None = None,
) -> _Triple:
    asked = _check(dy, s, lora_B, scaling, wants, dtype)
    r = _rank(s, lora_B)
    return (
        dy.new_empty((dy.shape[0], r), dtype=wide(dy.dtype)) if "ds" in asked else dy.new_empty(0),
        dy.new_empty((dy.shape[1], r), dtype=_dtype_of_dB(dy, lora_B, dtype))
        if "dB" in asked
        else dy.new_empty(0),
        dy.new_empty(dy.shape[1]) if "dbias" in asked else dy.new_empty(0),
    )


def _rank(s: Tensor | None, lora_B: Tensor | None) -> int:
    like = lora_B if s is None else s
    return 0 if like is None else like.shape[1]


def _dtype_of_dB(dy: Tensor, lora_B: Tensor | None, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or (dy.dtype if lora_B is None else lora_B.dtype)


def _reference(
    dy: Tensor,
    s: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    wants: str = _BOTH,
    dtype: torch.dtype | None = None,
) -> _Triple:
    asked = wants.split(",")
    found = dict.fromkeys(WANTS["expand_backward"], dy.new_empty(0))
    if "ds" in asked:
        assert lora_B is not None
        found["ds"] = reference.expand_ds(dy, lora_B, scaling)
    if "dB" in asked:
        assert s is not None
        found["dB"] = reference.expand_dB(dy, s, scaling, _dtype_of_dB(dy, lora_B, dtype))
    if "dbias" in asked:
        found["dbias"] = dy.sum(0)
    return found["ds"], found["dB"], found["dbias"]


register(
    "expand_backward",
    '(Tensor dy, Tensor? s, Tensor? lora_B, float scaling, str wants="ds,dB", '
    "ScalarType? dtype=None) -> (Tensor ds, Tensor dB, Tensor dbias)",
    _run,
    _fake,
)
differentiate_by_reference("expand_backward", _reference)
_call = runner("expand_backward", _reference, _check)


def expand_backward(dy: Tensor, s: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """``ds = scaling · dy·B`` and ``dB = scaling · dyᵀ·s``, in one pass over ``dy``.

    Shapes: ``dy [M, N]``, ``s [M, r]``, ``lora_B [N, r]`` → ``ds [M, r]`` in the dtype of ``s``
    (that of ``dy``, float32 for float16), ``dB [N, r]`` in the dtype of ``lora_B``.

    Raises:
        ValueError, TypeError: a shape or a dtype doesn't fit.
        BackendError: the forced backend can't serve the call.
    """
    ds, dB, _ = _call(dy, s, lora_B, scaling)
    return ds, dB
